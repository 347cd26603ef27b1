"""Local attention: a window that grows with the text."""

from functools import lru_cache

import torch
from torch import Tensor

from kv_compression.methods.rule import MaskMod, Rule, Tokens


class LocalAttention(Rule):
    """A query at text position q sees the keys from floor(q · ratio) on, the product taken in double precision.

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
    sinks = 0

    def window(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """How many of the first keys the queries at these positions see, and the first key of their window.

        Neither number falls from one position to the next. `positions` is long, on the CPU: not every device has
        double precision.
        """
        return torch.zeros_like(positions), (positions.double() * self.ratio).floor().long()

    def window_at(self, positions: Tensor, bound: int) -> tuple[Tensor, Tensor]:
        """`window` on any device, without waiting for it; no position reaches `bound`."""
        sinks, first = _windows(self, 1 << bound.bit_length(), positions.device)
        return sinks[positions], first[positions]

    def sees(self, tokens: Tokens) -> MaskMod:
        positions, num_sinks = tokens.positions, self.sinks
        sinks, first = self.window_at(positions, tokens.bound)

        def rule(b, h, q, k):
            keys = positions[b, k]
            seen = first[b, q] <= keys
            if num_sinks:
                seen = seen | (keys < sinks[b, q])
            return (k <= q) & seen

        return rule

    def keeps(self, tokens: Tokens, text_read: Tensor) -> Tensor:
        _, first = self.window_at(text_read[:, None], tokens.bound + 1)
        return (tokens.positions < self.sinks) | (tokens.positions >= first)

    def removed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        last = self.text(input_ids, attention_mask).sum(-1) - 1
        sinks, first = self.window_at(last.clamp(min=0), input_ids.shape[-1])
        return torch.where(last >= 0, first - sinks, 0)


@lru_cache(maxsize=64)
def _windows(rule: LocalAttention, length: int, device) -> tuple[Tensor, Tensor]:
    """The windows at the first so many positions: made once and kept, as a device would have to be waited for."""
    sinks, first = rule.window(torch.arange(length))
    return sinks.to(device), first.to(device)
