"""Who sees whom: one rule per method, and what it costs.

A rule is one small function of (block, head, query index, key index), the form that FlexAttention calls a mask_mod.
The dense mask and FlexAttention's block mask are both made from it. Knows tensors only: nothing here touches a model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kv_compression.sentinels import count_text, is_text, removed_entries, span_bounds

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
PAIRS_AT_ONCE = 1 << 21  # of a large dense mask, so that what lies between stays in the processor's cache


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A query sees itself and every earlier key."""
    return k <= q


def kv_compression(input_ids: Tensor, cl_id: int, cr_id: int) -> MaskMod:
    """The paper's rule (section 3), drawn for the block `a b < c d > e`, where `<` is <CL> and `>` is <CR>.

            a b < c d > e
        a   1
        b   1 1
        <   . . 1
        c   1 1 . 1
        d   1 1 . 1 1
        >   . . 1 1 1 1
        e   1 1 . . . 1 1

    Two things decide what an earlier key is to a query:
    - from `since[q]` on a query sees every key: a <CR> from its <CL>, a token inside a span from the span's first
      token, any other token from itself;
    - `open[k]` keys, a <CR> or a text token outside all spans, are seen by every later text token.

    `input_ids` is long `(batch, length)`.
    """
    length = input_ids.shape[-1]
    index = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    is_cl, is_cr = input_ids == cl_id, input_ids == cr_id
    text = ~(is_cl | is_cr)
    first, last = span_bounds(input_ids, cl_id, cr_id)
    inside = text & (last >= 0)
    begins_with_cl = is_cl.gather(-1, first.clamp(min=0))
    since = torch.where(is_cr, first, torch.where(inside, first + begins_with_cl, index))
    # Small integers, and arithmetic in place of comparisons: torch compares broadcast integers ten times more slowly.
    until_seen = (since - 1).to(torch.int16 if length < 2**15 else torch.int32)
    asks, open_ = text.to(torch.int8), (is_cr | (text & ~inside)).to(torch.int8)

    def rule(b, h, q, k):
        from_since = (k.to(until_seen.dtype) - until_seen[b, q]).clamp(min=0).bool()
        return (k <= q) & (from_since | (asks[b, q] * open_[b, k]).bool())

    return rule


def local_attention(length: int, ratio: float, device=None) -> MaskMod:
    """A query q sees the most recent keys only: floor(q·ratio) ≤ k ≤ q, the product taken in double precision.

    Drawn for ratio 0.5:

            a b c d e
        a   1
        b   1 1
        c   . 1 1
        d   . 1 1 1
        e   . . 1 1 1
    """
    # float64 is missing on some devices (MPS): the table is made on the CPU.
    first = (torch.arange(length, dtype=torch.float64) * ratio).floor().long().to(device)

    def rule(b, h, q, k):
        return (first[q] <= k) & (k <= q)

    return rule


def scattered_attention(kept: Tensor) -> MaskMod:
    """A query sees the earlier keys that were drawn, the same for all queries, and itself.

    `kept` is bool `(batch, length)`. Drawn for kept = 1 0 0 1 0:

            a b c d e
        a   1
        b   1 1
        c   1 . 1
        d   1 . . 1
        e   1 . . 1 1
    """

    def rule(b, h, q, k):
        return (k <= q) & (kept[b, k] | (k == q))

    return rule


def without_padding(rule: MaskMod, attention_mask: Tensor) -> MaskMod:
    """`rule`, with the tokens where `attention_mask` `(batch, length)` is 0 seen by nobody but themselves."""
    real = attention_mask.bool()

    def padded_rule(b, h, q, k):
        return (rule(b, h, q, k) & real[b, k]) | (q == k)

    return padded_rule


def dense_mask(rule: MaskMod, batch: int, length: int, device=None) -> Tensor:
    """The rule as a bool mask `(batch, length, length)`, True where query (row) may attend to key (column)."""
    return _rows(rule, batch, length, 0, device)


def _rows(rule: MaskMod, batch: int, length: int, start: int, device) -> Tensor:
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


def block_mask(rule: MaskMod, batch: int, length: int, device=None):
    """The rule as FlexAttention's `BlockMask` for `batch` sequences, shared by all heads."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(rule, B=batch, H=None, Q_LEN=length, KV_LEN=length, device=device or "cpu")


def kv_compression_mask(input_ids: Tensor, cl_id: int, cr_id: int) -> Tensor:
    """`kv_compression` as a bool mask `(batch, length, length)`."""
    return dense_mask(kv_compression(input_ids, cl_id, cr_id), *input_ids.shape, input_ids.device)


def local_attention_mask(length: int, ratio: float) -> Tensor:
    """`local_attention` as a bool mask `(length, length)`."""
    return dense_mask(local_attention(length, ratio), 1, length)[0]


def scattered_attention_mask(length: int, ratio: float, generator: torch.Generator) -> Tensor:
    """`scattered_attention` as a bool mask `(length, length)`, each key drawn with probability 1 − ratio."""
    kept = torch.rand(1, length, generator=generator, device=generator.device) >= ratio
    return dense_mask(scattered_attention(kept), 1, length, kept.device)[0]


def draw_keys(input_ids: Tensor, ratio: float, seed: int, read: "Read | None" = None) -> Tensor:
    """Scattered attention's draw, bool `(batch, length)`: True with probability 1 − ratio.

    A pseudo-random function of the seed and of the tokens up to and including the key. So a block's draw does not
    depend on the batch, the device or the process it is in, needs no state to resume from, and is known key by key
    while text is generated: `read` tells of what was read before, and is moved on. (This project.)
    """
    index = torch.arange(input_ids.shape[-1], device=input_ids.device)
    if read is None:
        prefix = _contribution(input_ids, index, seed).cumsum(-1)  # wraps modulo 2^64
    else:
        prefix = read.digest[:, None] + (_contribution(input_ids, read.positions, seed) * read.real).cumsum(-1)
        read.digest = prefix[:, -1]
    uniform = (_mix(prefix) & ((1 << 24) - 1)).to(torch.float32) / (1 << 24)
    return uniform >= ratio


def _contribution(input_ids: Tensor, positions: Tensor, seed: int) -> Tensor:
    """What a token adds to the digest of the text that it stands in."""
    return _mix(input_ids.long() * 0x10001 + _mix(positions + ((seed % (1 << 31)) << 32)))


def _mix(x: Tensor) -> Tensor:
    """Spread 64-bit integers evenly (the finalizer of splitmix64; torch has no unsigned shift, hence the masks)."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * (0x94D049BB133111EB - (1 << 64))
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def check_ratio(ratio: float) -> float:
    """Return `ratio`, or raise ValueError unless 0 ≤ ratio < 1."""
    if not 0 <= ratio < 1:
        raise ValueError(f"the compression ratio must be at least 0 and below 1, got {ratio}")
    return ratio


# What a cache remembers of a key it holds; KV compression's masks are made from these as they are from token ids.
TEXT, CL, CR, COMPRESSED, UNDRAWN, STRAY = range(6)  # STRAY: a <CR> that closes an empty span


@dataclass
class Read:
    """What a rule may have to know of the text that a cache has read.

    `positions` (long) and `real` (bool, False for padding) are `(batch, new)` and tell of the tokens being read. The
    others are `(batch,)` and tell of what was read before: `digest` (long) sums it up for `draw_keys`, `began` (bool)
    says whether it had a sentinel, `open` (bool) whether it ended inside a span.
    """

    positions: Tensor
    real: Tensor
    digest: Tensor
    began: Tensor
    open: Tensor


@dataclass(frozen=True)
class Rule:
    """What a method makes of a batch of token ids `(batch, length)`: this one is full causal attention.

    `ratio` is the share of the earlier keys that is asked to be out of sight (used by the window and the draw; for
    KV compression the spans in the tokens decide), `seed` the one of scattered attention's draw.

    A cache asks the same rule step by step: `kinds` says what to remember of new tokens, `sees` which of the keys held
    they see, `keeps` which keys a later token may see.
    """

    cl_id: int = -1
    cr_id: int = -1
    ratio: float = 0.0
    seed: int = 0

    name = "full_attention"
    uses_sentinels = False

    def __post_init__(self):
        check_ratio(self.ratio)

    def mask_mod(self, input_ids: Tensor) -> MaskMod:
        """The rule for these tokens."""
        return causal

    def visible(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> MaskMod:
        """The rule for these tokens, with padding (`attention_mask` 0) out of sight."""
        rule = self.mask_mod(input_ids)
        return rule if attention_mask is None else without_padding(rule, attention_mask)

    def text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """True where a token is text: neither a sentinel nor padding. Bool `(batch, length)`."""
        text = is_text(input_ids, self.cl_id, self.cr_id)
        return text if attention_mask is None else text & attention_mask.bool()

    def position_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Position ids, long `(batch, length)`; neither sentinels nor padding count."""
        return count_text(self.text(input_ids, attention_mask))

    def removed(self, input_ids: Tensor) -> Tensor:
        """Cache entries gone when the last token has been read, long `(batch,)`."""
        return torch.zeros_like(input_ids[:, 0])

    def same_as(self, other: "Rule") -> bool:
        """Whether both see alike: the ratio of KV compression is decided by the spans, not by the rule."""
        return self == other or (
            self.uses_sentinels and type(self) is type(other) and (self.cl_id, self.cr_id) == (other.cl_id, other.cr_id)
        )

    def with_seed(self, seed: int) -> "Rule":
        """The same rule with another draw."""
        return replace(self, seed=seed)

    def kinds(self, input_ids: Tensor, read: Read) -> Tensor:
        """What to remember of new tokens, long `(batch, new)`."""
        return torch.zeros_like(input_ids)

    def sees(self, kinds: Tensor, positions: Tensor, new: int) -> Tensor:
        """Which keys the last `new` of them see, bool `(batch, new, keys)`, padding aside.

        `kinds` and `positions` are `(batch, keys)`: the keys held, then the new ones.
        """
        return _last_rows(causal, kinds, new)

    def may_drop(self, new_kinds: Tensor) -> bool:
        """Whether reading these new tokens can have put a key out of every later token's sight."""
        return False

    def keeps(self, kinds: Tensor, positions: Tensor) -> Tensor:
        """Which keys the cache still holds when all of them have been read, bool `(batch, keys)`."""
        return torch.ones_like(kinds, dtype=torch.bool)


def _last_rows(rule: MaskMod, kinds: Tensor, new: int) -> Tensor:
    """The rows of a rule's dense mask for the last `new` queries."""
    batch, keys = kinds.shape
    return _rows(rule, batch, keys, keys - new, kinds.device)


class KVCompression(Rule):
    """Spans between sentinels are compressed into their <CR> (`kv_compression`)."""

    name = "kv_compression"
    uses_sentinels = True

    def mask_mod(self, input_ids: Tensor) -> MaskMod:
        return kv_compression(input_ids, self.cl_id, self.cr_id)

    def removed(self, input_ids: Tensor) -> Tensor:
        return removed_entries(input_ids, self.cl_id, self.cr_id)

    def kinds(self, input_ids: Tensor, read: Read) -> Tensor:
        is_cl, is_cr = input_ids == self.cl_id, input_ids == self.cr_id
        opened = read.open[:, None] | (is_cl.cumsum(-1) > 0)
        stray = is_cr & read.began[:, None] & ~opened
        return torch.where(stray, STRAY, is_cl * CL + is_cr * CR)

    def sees(self, kinds: Tensor, positions: Tensor, new: int) -> Tensor:
        seen = _last_rows(kv_compression(kinds, CL, CR), kinds, new)
        return seen & (kinds[:, -new:] != STRAY)[:, :, None]

    def may_drop(self, new_kinds: Tensor) -> bool:
        return bool(((new_kinds == CR) | (new_kinds == STRAY)).any())

    def keeps(self, kinds: Tensor, positions: Tensor) -> Tensor:
        _, last = span_bounds(kinds, CL, CR)
        return (last < 0) | (kinds == CR)


class LocalAttention(Rule):
    """Only the most recent share of the keys is kept (`local_attention`)."""

    name = "local_attention"

    def mask_mod(self, input_ids: Tensor) -> MaskMod:
        return local_attention(input_ids.shape[-1], self.ratio, input_ids.device)

    def removed(self, input_ids: Tensor) -> Tensor:
        batch, length = input_ids.shape
        return torch.full_like(input_ids[:, 0], int((length - 1) * self.ratio))

    def sees(self, kinds: Tensor, positions: Tensor, new: int) -> Tensor:
        first = self._first(positions[:, -new:])
        return _last_rows(causal, kinds, new) & (first[:, :, None] <= positions[:, None, :])

    def may_drop(self, new_kinds: Tensor) -> bool:
        return True

    def keeps(self, kinds: Tensor, positions: Tensor) -> Tensor:
        return self._first(positions[:, -1:]) <= positions

    def _first(self, positions: Tensor) -> Tensor:
        """The first position that a query sees; in double precision, which not every device has."""
        return (positions.cpu().double() * self.ratio).floor().long().to(positions.device)


class ScatteredAttention(Rule):
    """A random share of the keys is kept (`scattered_attention`, drawn by `draw_keys`)."""

    name = "scattered_attention"

    def mask_mod(self, input_ids: Tensor) -> MaskMod:
        return scattered_attention(draw_keys(input_ids, self.ratio, self.seed))

    def removed(self, input_ids: Tensor) -> Tensor:
        return (~draw_keys(input_ids, self.ratio, self.seed))[:, :-1].sum(-1)  # the last token sees itself

    def kinds(self, input_ids: Tensor, read: Read) -> Tensor:
        return (~draw_keys(input_ids, self.ratio, self.seed, read)) * UNDRAWN

    def sees(self, kinds: Tensor, positions: Tensor, new: int) -> Tensor:
        return _last_rows(scattered_attention(kinds != UNDRAWN), kinds, new)

    def may_drop(self, new_kinds: Tensor) -> bool:
        return bool((new_kinds == UNDRAWN).any())

    def keeps(self, kinds: Tensor, positions: Tensor) -> Tensor:
        return kinds != UNDRAWN


METHODS: dict[str, type[Rule]] = {rule.name: rule for rule in (Rule, KVCompression, LocalAttention, ScatteredAttention)}


class MaskCost(NamedTuple):
    """What a method costs, counted over blocks: see `measure`. Costs add up."""

    text_tokens: int = 0
    removed: int = 0
    attended_pairs: int = 0
    causal_pairs: int = 0

    @property
    def removed_fraction(self) -> float:
        """Cache entries gone at the end of a block ÷ text tokens."""
        return self.removed / max(self.text_tokens, 1)

    @property
    def attended_fraction(self) -> float:
        """Pairs of a text query and an earlier visible key ÷ pairs of text tokens (a token itself does not count)."""
        return self.attended_pairs / max(self.causal_pairs, 1)

    def __add__(self, other: "MaskCost") -> "MaskCost":
        return MaskCost(*map(sum, zip(self, other)))


def measure(rule: Rule, input_ids: Tensor, attention_mask: Tensor | None = None) -> MaskCost:
    """Count what `rule` keeps and sees on blocks `(batch, length)`, padded on the right. (This project.)"""
    text = rule.text(input_ids, attention_mask)
    mask = dense_mask(rule.visible(input_ids, attention_mask), *input_ids.shape, input_ids.device)
    per_query = mask.sum(-1) - 1  # every token sees itself
    num_text = text.sum(-1)
    return MaskCost(
        text_tokens=int(num_text.sum()),
        removed=int(rule.removed(input_ids).sum()),
        attended_pairs=int((per_query * text).sum()),
        causal_pairs=int((num_text * (num_text - 1) // 2).sum()),
    )
