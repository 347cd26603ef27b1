"""Budgets: a cache that stays small while it grows."""

from dataclasses import dataclass

from torch import nn

from kv_compression.methods.kv_compression import TEXT, KVCompression
from kv_compression.methods.ratio import check_ratio, share_to_remove
from kv_compression.model.cache import SentinelCache


@dataclass(frozen=True)
class Budget:
    """Keeps a cache small while text is generated: call `enforce` after every forward pass.

    A row that holds more than `max_length` keys, or more than n − round(`ratio` · n) after n text tokens, has its
    oldest run of `span_length` plain tokens folded, but never the most recent `recent` ones, until it is within the
    budget or has no such run. So a ratio is kept to within a span, and at most 1 − 1/span_length of the text can be
    removed.
    `max_length` is kept always: where folding is not enough the oldest keys are dropped, and memory is bounded however
    much is generated. (This project.)

    Example, for text that comes in pieces of token ids `(batch, length)`::

        budget = Budget(max_length=512)  # or ratio=0.9
        for piece in pieces:
            logits = model(input_ids=piece, past_key_values=cache).logits
            budget.enforce(cache)
    """

    max_length: int | None = None
    ratio: float | None = None
    span_length: int = 25
    recent: int = 0

    def __post_init__(self):
        if self.max_length is None and self.ratio is None:
            raise ValueError("a budget needs max_length or ratio")
        if self.ratio is not None:
            check_ratio(self.ratio)
        if self.span_length < 2 or self.recent < 0:
            raise ValueError("span_length must be at least 2 and recent at least 0")
        if self.max_length is not None and self.max_length < self.recent + self.span_length:
            raise ValueError("max_length must leave room for the recent tokens and one span")

    def allowed(self, text_read: int) -> int:
        """Keys that a row may hold when it has read so much text."""
        by_ratio = text_read - (0 if self.ratio is None else share_to_remove(text_read, self.ratio))
        return by_ratio if self.max_length is None else min(by_ratio, self.max_length)

    def enforce(self, cache: SentinelCache, model: nn.Module | None = None) -> None:
        """Fold, and drop if that is not enough, until every row is within the budget."""
        while cache.slots:
            lengths, read = cache.lengths.tolist(), cache.text_read.tolist()
            over = [max(length - self.allowed(text), 0) for length, text in zip(lengths, read)]
            if not any(over):
                return
            spans = [self._oldest_span(cache, row, read[row]) if over[row] else (0, -1) for row in range(len(over))]
            if all(last < first for first, last in spans):
                break
            cache.compress([first for first, _ in spans], [last for _, last in spans], model)
        if self.max_length is not None and cache.slots:
            cache.drop_oldest((cache.lengths - self.max_length).clamp(min=0))

    def _oldest_span(self, cache: SentinelCache, row: int, text_read: int) -> tuple[int, int]:
        """The oldest run of plain text that may be folded, inclusive; (0, -1) if there is none of a full span."""
        if not isinstance(cache.rule, KVCompression):
            return 0, -1
        recent, sinks = max(self.recent, cache.rule.recent_tokens), cache.rule.sink_tokens
        plain = cache.real[row] & (cache.kinds[row] == TEXT)
        plain &= (cache.positions[row] >= sinks) & (cache.positions[row] < text_read - recent)
        positions = cache.positions[row][plain].sort().values
        if len(positions) < self.span_length:
            return 0, -1
        # positions[i + span_length − 1] − positions[i] is span_length − 1 where a run is unbroken
        unbroken = positions[self.span_length - 1 :] - positions[: 1 - self.span_length] == self.span_length - 1
        found = unbroken.nonzero().flatten()
        if not len(found):
            return 0, -1
        first = int(positions[found[0]])
        return first, first + self.span_length - 1
