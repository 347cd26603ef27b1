"""The interface of a method, and the masks that come from it.

A rule is one small function of (block, head, query index, key index), the form that FlexAttention calls a mask_mod. The
dense mask, FlexAttention's block mask and what a cached query sees are all made from it. Tensors only: nothing here
touches a model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kv_compression.methods.ratio import check_ratio
from kv_compression.methods.sentinels import count_text, is_text, next_text_token

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
NEVER = 1 << 30  # a text position that no text reaches
PAIRS_AT_ONCE = 1 << 21  # of a large dense mask: what is computed on the way stays in the processor's cache


class Tokens(NamedTuple):
    """What a rule knows of tokens: those of whole blocks, or all that a cache holds with those being read at the end.

    All but the last are `(batch, length)`. `kinds` (long) is what `Rule.remember` says of a token, `positions` (long)
    its text position, `visible_from` (long) the text position from which on later text sees it. `ignored` (bool, or
    None) is True for padding. The tokens read in all are fewer than `bound`.
    """

    kinds: Tensor
    positions: Tensor
    visible_from: Tensor
    ignored: Tensor | None
    bound: int


class History(NamedTuple):
    """What a rule knows of the text that has been read, `(batch,)` each.

    `text_read` and `tokens_read` (long) count text tokens, and text tokens with sentinels; padding counts for nothing.
    `digest` (long) is a hash of the text, `began` (bool) says whether a sentinel was in it, `open` (bool) whether a
    span is open at its end.
    """

    text_read: Tensor
    tokens_read: Tensor
    digest: Tensor
    began: Tensor
    open: Tensor

    @classmethod
    def none(cls, batch: int, device=None) -> "History":
        """The history before the first token."""
        nothing = torch.zeros(batch, dtype=torch.long, device=device)
        return cls(nothing, nothing, nothing, nothing.bool(), nothing.bool())

    def places(self, input_ids: Tensor, real: Tensor | None) -> Tensor:
        """How many tokens were read before each of the new ones `(batch, new)`, padding aside; long."""
        if real is None:
            return self.tokens_read[:, None] + torch.arange(input_ids.shape[-1], device=input_ids.device)
        return self.tokens_read[:, None] + (real.long().cumsum(-1) - 1).clamp(min=0)


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A query sees itself and every earlier key."""
    return k <= q


@dataclass(frozen=True)
class Rule:
    """What a method makes of a batch of token ids `(batch, length)`: this one is full causal attention.

    `ratio` is the share of the earlier keys to hide (used by windows and draws; for KV
    compression the spans in the tokens decide), `seed` fixes the draw of scattered attention.

    A batch comes with an `attention_mask` `(batch, length)` or None: 0 is padding, on either side, and any other number
    that of the document in the block that a token is of. With `isolate_documents` documents do not see each other, with
    `position_ids_by_document` each counts its own positions.

    A new method overrides `mask_mod`, and is then right everywhere: in training, with padding, and in a cache, which
    holds all its keys. To drop keys it overrides `sees` instead, and says in `keeps` which keys can still be seen.
    (This project.)
    """

    cl_id: int = -1
    cr_id: int = -1
    ratio: float = 0.0
    seed: int = 0
    isolate_documents: bool = False
    position_ids_by_document: bool = False

    name = "unnamed"
    label = "unnamed"  # for readers
    colour, marker = "#7F7F7F", "h"  # in plots
    card = ""  # a sentence for a model card, which may name {cl_id} and {cr_id}
    uses_sentinels = False
    sink_tokens, recent_tokens, cr_tokens = 0, 0, 1  # of a rule without these options of KV compression
    num_kinds = NEVER  # what `remember` returns is below this

    def __post_init__(self):
        check_ratio(self.ratio)

    # What a method defines.

    def mask_mod(self, input_ids: Tensor) -> MaskMod:
        """The rule for these token ids `(batch, length)`, which hold no padding."""
        return causal

    def sees(self, tokens: Tokens) -> MaskMod:
        """The rule for tokens whose kinds come from `remember`; padding is masked elsewhere.

        By default `mask_mod` of the token ids, with the padding between them taken out.
        """
        if tokens.ignored is None:
            return self.mask_mod(tokens.kinds)
        order = tokens.ignored.long().argsort(dim=-1, stable=True)
        rank = order.argsort(dim=-1)
        rule = self.mask_mod(tokens.kinds.gather(-1, order))
        return lambda b, h, q, k: rule(b, h, rank[b, q], rank[b, k]) & (k <= q)

    def remember(self, input_ids: Tensor, real: Tensor | None, history: History) -> tuple[Tensor, History]:
        """What is remembered of new tokens `(batch, new)`, long, by default their ids; and the history with them.

        `real` is False for padding, None if there is none. The caller counts what was read.
        """
        return input_ids, history

    def settled(self, tokens: Tokens) -> Tokens:
        """The tokens as they are remembered once all of them have been read."""
        return tokens

    def is_open(self, tokens: Tokens) -> Tensor:
        """Whether a span is open at the end of settled tokens, bool `(batch,)`."""
        return torch.zeros_like(tokens.kinds[:, 0], dtype=torch.bool)

    def keeps(self, tokens: Tokens, history: History) -> Tensor:
        """Which settled keys a token to come may see, bool `(batch, length)`."""
        return torch.ones_like(tokens.kinds, dtype=torch.bool)

    def is_quiet(self, tokens: Tokens, history: History) -> bool:
        """Whether every text token to come sees all of these, so that none will ever leave."""
        return False

    def key_order(self, input_ids: Tensor) -> Tensor:
        """An order of the keys, long `(batch, length)`, in which those that are seen alike stand together."""
        return torch.arange(input_ids.shape[-1], device=input_ids.device).expand_as(input_ids)

    # What follows from it.

    def visible(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> MaskMod:
        """The rule for a batch, with padding (`attention_mask` 0) out of sight."""
        rule = self.sees(self.tokens(input_ids, attention_mask))
        return rule if attention_mask is None else within(rule, attention_mask, self.isolate_documents)

    def mask(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`visible` as a bool mask `(batch, length, length)`: True where query (row) may attend to key (column)."""
        return dense_mask(self.visible(input_ids, attention_mask), *input_ids.shape, input_ids.device)

    def tokens(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tokens:
        """Whole blocks `(batch, length)` as a rule reads them."""
        real = None if attention_mask is None else attention_mask.bool()
        positions = count_text(self.text(input_ids, real))
        kinds, _ = self.remember(input_ids, real, History.none(len(input_ids), input_ids.device))
        ignored = None if real is None else ~real
        return Tokens(kinds, positions, torch.zeros_like(positions), ignored, input_ids.shape[-1] + 1)

    def text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """True where a token is text: neither a sentinel nor padding. Bool `(batch, length)`."""
        text = is_text(input_ids, self.cl_id, self.cr_id)
        return text if attention_mask is None else text & attention_mask.bool()

    def position_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Position ids, long `(batch, length)`; neither sentinels nor padding count. (Paper, section 3.)"""
        text = self.text(input_ids, attention_mask)
        if attention_mask is None or not self.position_ids_by_document:
            return count_text(text)
        text = text.long()
        count = text.cumsum(-1)
        begins = torch.ones_like(text, dtype=torch.bool)
        begins[:, 1:] = attention_mask[:, 1:] != attention_mask[:, :-1]
        before = torch.where(begins, count - text, 0).cummax(-1).values
        return (count - before - 1).clamp(min=0)

    def removed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Cache entries gone at the end of a block, long `(batch,)`: keys that are out of sight there, less the <CR>.

        What is in sight is what the block's last token sees or, where there are sentinels, what text after the block
        would: a <CR> at its end still sees its span. 0 for a method without `keeps`, as its cache holds all keys.
        """
        if type(self).keeps is Rule.keeps:
            return torch.zeros_like(input_ids[:, 0])
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if self.uses_sentinels:
            input_ids = pad(input_ids, (0, 1), value=max(self.cl_id, self.cr_id) + 1)
            real = pad(real, (0, 1), value=True)
        batch, length = input_ids.shape
        rows, keys = torch.arange(batch, device=real.device)[:, None], torch.arange(length, device=real.device)[None]
        last = torch.where(real, keys, 0).amax(-1, keepdim=True)
        gone = real & ~self.sees(self.tokens(input_ids, real))(rows, 0, last, keys)
        if not self.uses_sentinels:
            return gone.sum(-1)
        return (gone & self.text(input_ids)).sum(-1) - (real & (input_ids == self.cr_id)).sum(-1)

    def targets(self, input_ids: Tensor) -> Tensor:
        """The next text token of every text token, long `(batch, length)`, -100 for sentinels and the last one."""
        return next_text_token(input_ids, self.cl_id, self.cr_id)

    def same_as(self, other: "Rule") -> bool:
        """Whether both see alike: the ratio of KV compression is decided by the spans, not by the rule."""
        return self == other or (
            type(self) is type(other)
            and self.uses_sentinels
            and replace(self, ratio=other.ratio, seed=other.seed) == other
        )

    def with_seed(self, seed: int) -> "Rule":
        """The same rule with another draw."""
        return replace(self, seed=seed)


def within(rule: MaskMod, attention_mask: Tensor, isolate_documents: bool = False) -> MaskMod:
    """`rule`, with the tokens where `attention_mask` `(batch, length)` is 0 seen by nobody but themselves.

    With `isolate_documents` tokens with different numbers in `attention_mask` do not see each other either, and every
    token sees itself: what else a rule lets it see may all be in other documents.
    """
    real = attention_mask.bool()

    def padded_rule(b, h, q, k):
        seen = rule(b, h, q, k) & real[b, k]
        if isolate_documents:
            seen = seen & (attention_mask[b, q] == attention_mask[b, k])
        return seen | ((q == k) & (isolate_documents | ~real[b, k]))

    return padded_rule


def in_order(rule: MaskMod, order: Tensor) -> MaskMod:
    """`rule` for keys of which the k-th is the key `order[b, k]`, long `(batch, length)`."""
    return lambda b, h, q, k: rule(b, h, q, order[b, k])


def dense_mask(rule: MaskMod, batch: int, length: int, device=None) -> Tensor:
    """The rule as a bool mask `(batch, length, length)`, True where query (row) may attend to key (column)."""
    return rows_of(rule, batch, length, 0, device)


def rows_of(rule: MaskMod, batch: int, length: int, start: int, device=None) -> Tensor:
    """The dense mask's rows from `start` on, bool `(batch, length - start, length)`."""
    index = torch.arange(length, device=device)
    q, k = index[start:].view(1, -1, 1), index.view(1, 1, -1)
    blocks = torch.arange(batch, device=device).view(-1, 1, 1)
    together = max(PAIRS_AT_ONCE // (len(index[start:]) * length), 1)
    if together >= batch:
        return rule(blocks, 0, q, k).expand(batch, length - start, length)
    mask = torch.empty(batch, length - start, length, dtype=torch.bool, device=device)
    for some, part in zip(blocks.split(together), mask.split(together)):
        part.copy_(rule(some, 0, q, k))
    return mask


def own_key(new: int, slots: int, device) -> Tensor:
    """The own key of each of the last `new` tokens among as many `slots`: bool `(new, slots)`."""
    index = torch.arange(slots, device=device)
    return index == index[slots - new :, None]


def block_mask(rule: MaskMod, batch: int, length: int, device=None):
    """The rule as FlexAttention's `BlockMask` for `batch` sequences, shared by all heads."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(rule, B=batch, H=None, Q_LEN=length, KV_LEN=length, device=device or "cpu")
