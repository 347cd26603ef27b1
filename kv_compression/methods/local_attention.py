"""Local attention: a window that grows with the text."""

from functools import lru_cache

import torch
from torch import Tensor

from kv_compression.methods.rule import History, MaskMod, Rule, Tokens


class LocalAttention(Rule):
    """A query q sees the keys from floor(q · ratio) on, the product taken in double precision.

    Drawn for ratio 0.5:

            a b c d e
        a   1
        b   1 1
        c   . 1 1
        d   . 1 1 1
        e   . . 1 1 1

    (Paper, section 4.1.)
    """

    name = "local_attention"
    label = "local attention"
    colour = "#0072B2"
    marker = "s"
    card = "A token sees the most recent keys only, the share 1 − ratio of those before it."
    sinks = 0

    def window(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """How many of the first keys these queries see, and the first key of their window.

        Neither number falls from one query to the next. `queries` is long, on the CPU: not every device has double
        precision.
        """
        return torch.zeros_like(queries), (queries.double() * self.ratio).floor().long()

    def window_at(self, queries: Tensor, bound: int) -> tuple[Tensor, Tensor]:
        """`window` on any device, without waiting for it; no query reaches `bound`."""
        sinks, first = _windows(self, 1 << bound.bit_length(), queries.device)
        return sinks[queries], first[queries]

    def remember(self, input_ids: Tensor, real: Tensor | None, history: History) -> tuple[Tensor, History]:
        return history.places(input_ids, real), history

    def sees(self, tokens: Tokens) -> MaskMod:
        places, num_sinks = tokens.kinds, self.sinks
        sinks, first = self.window_at(places, tokens.bound)

        def rule(b, h, q, k):
            keys = places[b, k]
            seen = first[b, q] <= keys
            if num_sinks:
                seen = seen | (keys < sinks[b, q])
            return (k <= q) & seen

        return rule

    def keeps(self, tokens: Tokens, history: History) -> Tensor:
        _, first = self.window_at(history.tokens_read[:, None], tokens.bound)
        return (tokens.kinds < self.sinks) | (tokens.kinds >= first)


@lru_cache(maxsize=64)
def _windows(rule: LocalAttention, length: int, device) -> tuple[Tensor, Tensor]:
    """The windows of the first so many queries: made once and kept, as a device would have to be waited for."""
    sinks, first = rule.window(torch.arange(length))
    return sinks.to(device), first.to(device)
