"""Scattered attention: a random share of the keys, the same for all queries of a block."""

import torch
from torch import Tensor

from kv_compression.methods.rule import History, MaskMod, Rule, Tokens

DRAWN, UNDRAWN = 0, 1  # the kinds of a key


class ScatteredAttention(Rule):
    """A query sees itself and the earlier keys that were drawn, each with probability 1 − ratio.

    Drawn for keys of which a and d were drawn:

            a b c d e
        a   1
        b   1 1
        c   1 . 1
        d   1 . . 1
        e   1 . . 1 1

    The draw is a pseudo-random function of the seed and of the text up to and including the key. So it does not depend
    on the batch, the device or the process, needs no state to resume from, and is known key by key while text is
    generated. (Paper, section 4.1, for the rule; this project for the draw.)
    """

    name = "scattered_attention"
    label = "scattered attention"
    colour = "#009E73"
    marker = "^"
    card = "A token sees itself and a random share 1 − ratio of the keys before it."
    num_kinds = UNDRAWN + 1

    def remember(self, input_ids: Tensor, real: Tensor | None, history: History) -> tuple[Tensor, History]:
        places = history.places(input_ids, real)
        drawn, digest = draw_keys(input_ids, self.ratio, self.seed, places, real, history.digest)
        return torch.where(drawn, DRAWN, UNDRAWN), history._replace(digest=digest)

    def sees(self, tokens: Tokens) -> MaskMod:
        drawn = tokens.kinds == DRAWN
        return lambda b, h, q, k: (k <= q) & (drawn[b, k] | (k == q))

    def keeps(self, tokens: Tokens, history: History) -> Tensor:
        return tokens.kinds == DRAWN


def draw_keys(
    input_ids: Tensor,
    ratio: float,
    seed: int,
    places: Tensor | None = None,
    real: Tensor | None = None,
    digest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which keys are drawn, bool `(batch, length)`, and the digest `(batch,)` of all text up to their end.

    `places` count the tokens (from 0 by default), `real` is False for padding, which counts for nothing, and `digest`
    is that of the text before. (This project.)
    """
    if places is None:
        places = torch.arange(input_ids.shape[-1], device=input_ids.device)
    parts = _mix(input_ids.long() * 0x10001 + _mix(places + ((seed % (1 << 31)) << 32)))
    prefix = (parts if real is None else parts * real).cumsum(-1)  # wraps modulo 2^64
    prefix = prefix if digest is None else digest[:, None] + prefix
    uniform = (_mix(prefix) & ((1 << 24) - 1)).to(torch.float32) / (1 << 24)
    return uniform >= ratio, prefix[:, -1]


def _mix(x: Tensor) -> Tensor:
    """Spread 64-bit integers evenly (the finalizer of splitmix64; torch has no unsigned shift, hence the masks)."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * (0x94D049BB133111EB - (1 << 64))
    return x ^ ((x >> 31) & ((1 << 33) - 1))
