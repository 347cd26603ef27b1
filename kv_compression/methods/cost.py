"""What a mask costs: the keys that a cache must hold, and the pairs that attention computes."""

from typing import NamedTuple

import torch
from torch import Tensor

from kv_compression.methods.rule import Rule


class MaskCost(NamedTuple):
    """What a method costs, counted over blocks: see `measure`. Costs add up."""

    text_tokens: int = 0
    removed: int = 0
    attended_pairs: int = 0
    causal_pairs: int = 0
    kept_keys: int = 0
    most_kept: int = 0

    @property
    def removed_fraction(self) -> float:
        """Cache entries gone at the end of a block ÷ text tokens."""
        return self.removed / max(self.text_tokens, 1)

    @property
    def attended_fraction(self) -> float:
        """Pairs of a text query and an earlier visible key ÷ pairs of text tokens (a token itself does not count)."""
        return self.attended_pairs / max(self.causal_pairs, 1)

    @property
    def kept_keys_mean(self) -> float:
        """Keys that a cache has to hold while a text token is read, its own among them, on average."""
        return self.kept_keys / max(self.text_tokens, 1)

    def __add__(self, other: "MaskCost") -> "MaskCost":
        added = MaskCost(*map(sum, zip(self, other)))
        return added._replace(most_kept=max(self.most_kept, other.most_kept))


def measure(rule: Rule, input_ids: Tensor, attention_mask: Tensor | None = None) -> MaskCost:
    """Count what `rule` keeps and sees on blocks `(batch, length)`, padded on either side.

    A cache holds a key as long as the token being read or a later one sees it: a span that is still being read, its
    <CL> too, counts in full. `most_kept` is the largest such number. (This project.)
    """
    text = rule.text(input_ids, attention_mask)
    mask = rule.mask(input_ids, attention_mask)
    own = mask.diagonal(dim1=1, dim2=2)
    per_query = mask.sum(-1) - own.long()
    readers = mask if attention_mask is None else mask & attention_mask.bool()[:, :, None]
    seen_from_here = readers.flip(1).to(torch.int8).cummax(1).values.flip(1)
    seen_from_here.diagonal(dim1=1, dim2=2).fill_(1)  # a token's own key is there while it is read
    held = torch.tril(seen_from_here)
    if attention_mask is not None:
        held *= attention_mask.bool()[:, None, :]
    held = held.sum(-1) * text
    num_text = text.sum(-1)
    return MaskCost(
        text_tokens=int(num_text.sum()),
        removed=int(rule.removed(input_ids, attention_mask).sum()),
        attended_pairs=int((per_query * text).sum()),
        causal_pairs=int((num_text * (num_text - 1) // 2).sum()),
        kept_keys=int(held.sum()),
        most_kept=int(held.max()),
    )
