"""How a run draws spans: one sampler with its options."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kv_compression.methods import METHODS
from kv_compression.methods.ratio import most_removable, share_to_remove, shortest_spans, widest_window
from kv_compression.spans.chosen import cheapest_spans, fixed_spans
from kv_compression.spans.exact import exact_spans

if TYPE_CHECKING:
    from kv_compression.settings import Settings


@dataclass(frozen=True)
class SpanPlan:
    """How spans are drawn at `ratio` with `seed`, if the method compresses spans at all (`compress`).

    The `sampler` is "random" (that of the protocol), "shortest" (random ones, none longer than the share demands),
    "fixed" (equal chunks) or "self_information" (where the base model is least surprised, in whole units). With
    `lowest_ratio` every training block has a ratio of its own, uniform between that and `ratio`. The first
    `sink_tokens` and the last `recent_tokens` of a block stay outside spans; `cr_tokens` <CR> close a span.
    """

    compress: bool
    ratio: float
    max_span_length: int
    seed: int
    sampler: str = "random"
    sink_tokens: int = 0
    recent_tokens: int = 0
    cr_tokens: int = 1
    lowest_ratio: float | None = None

    def drawn(self, rng: np.random.Generator) -> "SpanPlan":
        """The plan with the ratio of one training block."""
        if self.lowest_ratio is None:
            return self
        return replace(self, ratio=float(rng.uniform(self.lowest_ratio, self.ratio)), lowest_ratio=None)

    def within(self, num_tokens: int) -> "SpanPlan":
        """The plan for a text of any length: its window, and then its ratio, fall as far as spans demand."""
        longest = num_tokens - min(self.sink_tokens, num_tokens)
        most = most_removable(longest, self.max_span_length, self.cr_tokens)
        if share_to_remove(num_tokens, self.ratio) > most:
            return replace(self, ratio=most / num_tokens, recent_tokens=0)
        return replace(self, recent_tokens=min(self.recent_tokens, self.window(num_tokens)))

    def spans(self, num_tokens: int, rng, information=None, unit_starts=None) -> list[tuple[int, int]]:
        """Spans that remove the exact share of a text of `num_tokens`. ValueError if none can.

        `information` and `unit_starts`, one value a token, are for the sampler "self_information".
        """
        last = max(num_tokens - self.recent_tokens, 0)
        region = {"cr_tokens": self.cr_tokens, "first": min(self.sink_tokens, last), "last": last}
        if self.sampler == "fixed":
            return fixed_spans(num_tokens, self.ratio, self.max_span_length, **region)
        if self.sampler == "self_information":
            return cheapest_spans(information, self.ratio, self.max_span_length, unit_starts=unit_starts, **region)
        longest = self.max_span_length
        if self.sampler == "shortest":
            longest = shortest_spans(num_tokens, self.ratio, longest, **region)
        return exact_spans(num_tokens, self.ratio, longest, rng, **region)

    def window(self, num_tokens: int) -> int:
        """How many of the last tokens of a text can stay outside spans that remove the exact share."""
        shape = (self.max_span_length, self.cr_tokens, min(self.sink_tokens, num_tokens))
        return widest_window(num_tokens, self.ratio, *shape)

    def spans_by_document(self, documents, rng, information=None, unit_starts=None) -> list[tuple[int, int]]:
        """As `spans`, but no span crosses two documents; `documents` holds the number of each token's document.

        All documents lose as equal a share as spans allow.
        """
        num_tokens = len(documents)
        bounds = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), num_tokens]
        regions = []
        for start, end in zip(bounds, bounds[1:]):
            first, last = max(start, self.sink_tokens), min(end, num_tokens - self.recent_tokens)
            if last > first:
                regions.append((first, last))
        bound = [most_removable(last - first, self.max_span_length, self.cr_tokens) for first, last in regions]
        to_remove = share_to_remove(num_tokens, self.ratio)
        if to_remove > sum(bound):
            raise ValueError(
                f"ratio {self.ratio} asks to remove {to_remove} of {num_tokens} tokens, but spans of at most "
                f"{self.max_span_length} can remove {sum(bound)} from the {len(regions)} documents of a block: "
                "lower the ratio, allow longer spans or do not isolate documents"
            )
        spans = []
        for number, (first, last) in enumerate(regions):
            left = sum(bound[number + 1 :])
            share = round(to_remove * (last - first) / sum(end - start for start, end in regions[number:]))
            share = max(min(share, bound[number]), to_remove - left)
            to_remove -= share
            part = replace(self, ratio=share / (last - first), sink_tokens=0, recent_tokens=0)
            own = (None if column is None else column[first:last] for column in (information, unit_starts))
            spans += [(first + begin, first + end) for begin, end in part.spans(last - first, rng, *own)]
        return spans


def plan_of(settings: "Settings") -> SpanPlan:
    """How a run with these settings draws spans."""
    return SpanPlan(
        METHODS[settings.method].uses_sentinels,
        settings.bound_ratio,
        settings.max_span_length,
        settings.seed,
        settings.span_sampler,
        settings.sink_tokens,
        settings.recent_tokens,
        settings.cr_tokens,
        settings.lowest_bound_ratio,
    )
