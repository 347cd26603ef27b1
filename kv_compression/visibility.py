"""Who sees whom: one rule per method, and what it costs.

A rule is one small function of (block, head, query index, key index), the form that FlexAttention calls a mask_mod.
The dense mask and FlexAttention's block mask are both made from it. Knows tensors only: nothing here touches a model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kv_compression.sentinels import count_text, is_text, span_bounds

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SINKS = 4  # as many as StreamingLLM keeps
CR_VISIBILITIES = ("span", "context")
NEVER = 1 << 30  # a text position that is not reached
PAIRS_AT_ONCE = 1 << 21  # of a large dense mask, so that what lies between stays in the processor's cache


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A query sees itself and every earlier key."""
    return k <= q


def kv_compression(
    input_ids: Tensor,
    cl_id: int,
    cr_id: int,
    *,
    sink_tokens: int = 0,
    cr_tokens: int = 1,
    cr_visibility: str = "span",
    recent_tokens: int = 0,
) -> MaskMod:
    """The paper's rule (section 3), drawn for the block `a b < c d > e`, where `<` is <CL> and `>` is <CR>.

            a b < c d > e
        a   1
        b   1 1
        <   . . 1
        c   1 1 . 1
        d   1 1 . 1 1
        >   . . 1 1 1 1
        e   1 1 . . . 1 1

    The options are this project's, and off by default:
    - `sink_tokens`: the block's first so many text tokens are seen by every later token, even if they are in a span;
    - `cr_tokens`: so many <CR> in a row close a span, and see it, and the earlier ones of their own;
    - `cr_visibility` "context": a <CR> also sees what text at its place would see, earlier <CR> and uncompressed text;
    - `recent_tokens`: a token of a closed span is seen by the text until so many text tokens have been read behind it,
      and the span's <CR> only from when its first token has gone.

    `input_ids` is long `(batch, length)`.
    """
    text = is_text(input_ids, cl_id, cr_id)
    lifetimes = _lifetimes(input_ids, cl_id, cr_id, count_text(text), sink_tokens, cr_tokens, recent_tokens)
    return lifetimes.rule(text | (input_ids == cr_id) if cr_visibility == "context" else text)


class _Lifetimes(NamedTuple):
    """What decides who sees a key under KV compression, all `(batch, length)`.

    A query sees every key from index `since[q]` on, and every sink. If it asks for context it sees besides the keys
    with starts[k] ≤ times[q] ≤ ends[k], or just the `lasting` ones where no token outlives its span (`recent` 0).
    """

    since: Tensor
    times: Tensor
    starts: Tensor
    ends: Tensor
    lasting: Tensor
    sinks: Tensor | None
    recent: int

    def rule(self, asks: Tensor) -> MaskMod:
        """The rule for queries of which those in `asks`, bool `(batch, length)`, ask for context."""
        # Small integers, and arithmetic in place of comparisons: torch compares broadcast integers ten times slower.
        dtype = torch.int16 if self.since.shape[-1] < 2**14 and not self.recent else torch.int32
        until_seen, asks = (self.since - 1).to(dtype), asks.to(torch.int8)
        lasting, sinks = self.lasting.to(torch.int8), self.sinks
        before, at, behind = ((self.starts - 1).to(dtype), self.times.to(dtype), (self.ends + 1).to(dtype))

        def rule(b, h, q, k):
            seen = (k.to(dtype) - until_seen[b, q]).clamp(min=0).bool()
            if self.recent:
                in_time = (at[b, q] - before[b, k]).clamp(0, 1) * (behind[b, k] - at[b, q]).clamp(0, 1)
                seen = seen | (in_time * asks[b, q]).bool()
            else:
                seen = seen | (asks[b, q] * lasting[b, k]).bool()
            if sinks is not None:
                seen = seen | sinks[b, k]
            return (k <= q) & seen

        return rule


def _lifetimes(
    ids, cl_id, cr_id, positions, sink_tokens, cr_tokens, recent, starts=None, leaving=None, ignored=None
) -> _Lifetimes:
    """See `_Lifetimes`. A cache tells which keys to ignore, and `starts` and `leaving` of spans it has closed."""
    index = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    is_cl, is_cr = ids == cl_id, ids == cr_id
    text = ~(is_cl | is_cr)
    first, last = span_bounds(ids, cl_id, cr_id, cr_tokens, ignored)
    begins_with_cl = is_cl.gather(-1, first.clamp(min=0))
    sinks = text & (positions < sink_tokens) if sink_tokens else None
    inside = text & (last >= 0)
    since = torch.where(is_cr, first, torch.where(inside, first + begins_with_cl, index))
    compressed = inside if sinks is None else inside & ~sinks
    leaves = compressed if leaving is None else compressed | leaving
    if not recent:
        nothing = torch.zeros_like(positions)
        return _Lifetimes(since, nothing, nothing, nothing, ~is_cl & ~leaves, sinks, 0)

    # A <CR> stands in for its span from when the first of its tokens has gone; an empty span has none to wait for.
    real_text = text if ignored is None else text & ~ignored
    next_text = torch.where(real_text, index, ids.shape[-1] - 1).flip(-1).cummin(-1).values.flip(-1)
    start = next_text.gather(-1, (first + begins_with_cl).clamp(min=0))
    waits = is_cr & (start < last) & (positions.gather(-1, last.clamp(min=0)) >= sink_tokens)
    first_to_go = positions.gather(-1, start).clamp(min=sink_tokens)
    begin = torch.where(waits, first_to_go + recent + 1, 0 if starts is None else starts)
    end = torch.where(leaves, positions + recent, torch.where(is_cl, -1, NEVER))
    times = positions + is_cr  # a <CR> asks for what the text behind it would see
    return _Lifetimes(since, times, begin, end, ~is_cl & ~leaves, sinks, recent)


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
    first = _first_keys(length, ratio, device)

    def rule(b, h, q, k):
        return (first[q] <= k) & (k <= q)

    return rule


# These two are made once and kept: a device would have to be waited for each time. float64 is missing on some (MPS).
@lru_cache(maxsize=64)
def _first_keys(length: int, ratio: float, device) -> Tensor:
    """The first key that each of so many queries sees under local attention."""
    return (torch.arange(length, dtype=torch.float64) * ratio).floor().long().to(device)


@lru_cache(maxsize=64)
def _sinks_and_first_keys(length: int, ratio: float, sink_tokens: int, device) -> tuple[Tensor, Tensor]:
    """How many sinks each of so many queries sees under sink attention, and its first recent key."""
    sinks, recent = _sinks_and_recent(torch.arange(length), ratio, sink_tokens)
    return sinks.to(device), recent.to(device)


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


def sink_attention(length: int, ratio: float, sink_tokens: int = SINKS, device=None) -> MaskMod:
    """A query q sees its first min(sink_tokens, kept) keys and its most recent, kept = ⌈(1 − ratio)(q + 1)⌉ in all.

    The product is taken in double precision, as for local attention: 1 − 0.7 is a little more than 0.3 there, and one
    more key is kept where the exact product is whole. Where so few are kept that all of them are sinks, a query does
    not even see itself. Drawn for ratio 0.5 and 2 sinks:

            a b c d e f g
        a   1
        b   1 .
        c   1 1 .
        d   1 1 . .
        e   1 1 . . 1
        f   1 1 . . . 1
        g   1 1 . . . 1 1

    (StreamingLLM, Xiao et al. 2024, for sinks and a window; this project for the shares.)
    """
    sinks, recent = _sinks_and_first_keys(length, ratio, sink_tokens, device)

    def rule(b, h, q, k):
        return (k <= q) & ((k < sinks[q]) | (k >= recent[q]))

    return rule


def _sinks_and_recent(positions: Tensor, ratio: float, sink_tokens: int) -> tuple[Tensor, Tensor]:
    """How many of the first keys the queries at these positions see, and their first recent key. On the CPU."""
    positions = positions.cpu()
    kept = ((1 - ratio) * (positions + 1).double()).ceil().long()
    sinks = kept.clamp(max=sink_tokens)
    return sinks, positions + 1 - (kept - sinks)


def text_only(text: Tensor) -> MaskMod:
    """Full causal attention among the text tokens, bool `(batch, length)`; a sentinel is seen by itself alone."""

    def rule(b, h, q, k):
        return (k <= q) & (text[b, k] | (k == q))

    return rule


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
# STRAY: a <CR> that closes an empty span. COMPRESSED: a <CR> whose span is closed. LEAVING: text of a closed
# span. GONE: a <CL> whose span is closed.
TEXT, CL, CR, COMPRESSED, UNDRAWN, STRAY, LEAVING, GONE = range(8)


class Held(NamedTuple):
    """The keys that a cache holds, long `(batch, keys)`: what they are, their text positions, and the text position
    from which on a key is seen (0, but for a <CR> whose span has not left yet)."""

    kinds: Tensor
    positions: Tensor
    starts: Tensor


@dataclass
class Read:
    """What a rule may have to know of the text that a cache has read.

    `positions` (long) and `real` (bool, False for padding) are `(batch, new)` and tell of the tokens being read. The
    others are `(batch,)` and tell of what was read before: `digest` (long) sums it up for `draw_keys`, `began` (bool)
    says whether it had a sentinel, `open` (bool) whether it ended inside a span or among its <CR>.
    """

    positions: Tensor
    real: Tensor
    digest: Tensor
    began: Tensor
    open: Tensor


@dataclass(frozen=True)
class Rule:
    """What a method makes of a batch of token ids `(batch, length)`: this one is full causal attention.

    `ratio` is the share of the earlier keys that is asked to be out of sight (used by the windows and the draw; for
    KV compression the spans in the tokens decide), `seed` the one of scattered attention's draw. `sink_tokens` is for
    KV compression and sink attention (0: as many as each has by default), the three after it for KV compression alone:
    see `kv_compression`.

    A batch comes with an `attention_mask` `(batch, length)` or None: 0 is padding, and any other number that of the
    document in the block that a token is of. With `isolate_documents` documents do not see each other, with
    `position_ids_by_document` each counts its own.

    A cache asks the same rule step by step: `kinds` says what to remember of new tokens, `sees` which of the keys held
    they see, `settled` what they are when all is read, `keeps` which of them a later token may see.
    """

    cl_id: int = -1
    cr_id: int = -1
    ratio: float = 0.0
    seed: int = 0
    sink_tokens: int = 0
    cr_tokens: int = 1
    cr_visibility: str = "span"
    recent_tokens: int = 0
    isolate_documents: bool = False
    position_ids_by_document: bool = False

    name = "full_attention"
    uses_sentinels = False

    def __post_init__(self):
        check_ratio(self.ratio)
        if self.cr_visibility not in CR_VISIBILITIES:
            raise ValueError(f"cr_visibility must be one of {', '.join(CR_VISIBILITIES)}, got {self.cr_visibility}")
        if self.sink_tokens < 0 or self.recent_tokens < 0 or self.cr_tokens < 1:
            raise ValueError("sink_tokens and recent_tokens must be at least 0, cr_tokens at least 1")

    def mask_mod(self, input_ids: Tensor) -> MaskMod:
        """The rule for these tokens."""
        return causal

    def visible(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> MaskMod:
        """The rule for these tokens, with padding (`attention_mask` 0) out of sight."""
        rule = self.mask_mod(input_ids)
        return rule if attention_mask is None else within(rule, attention_mask, self.isolate_documents)

    def text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """True where a token is text: neither a sentinel nor padding. Bool `(batch, length)`."""
        text = is_text(input_ids, self.cl_id, self.cr_id)
        return text if attention_mask is None else text & attention_mask.bool()

    def position_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Position ids, long `(batch, length)`; neither sentinels nor padding count."""
        text = self.text(input_ids, attention_mask)
        if attention_mask is None or not self.position_ids_by_document:
            return count_text(text)
        text = text.long()
        count = text.cumsum(-1)
        begins = torch.ones_like(text, dtype=torch.bool)
        begins[:, 1:] = attention_mask[:, 1:] != attention_mask[:, :-1]
        before = torch.where(begins, count - text, 0).cummax(-1).values
        return (count - before - 1).clamp(min=0)

    def key_order(self, input_ids: Tensor) -> Tensor:
        """An order of the keys, long `(batch, length)`, in which those that are seen alike stand together."""
        return torch.arange(input_ids.shape[-1], device=input_ids.device).expand_as(input_ids)

    def removed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Cache entries gone when the last token has been read, long `(batch,)`."""
        return torch.zeros_like(input_ids[:, 0])

    def same_as(self, other: "Rule") -> bool:
        """Whether both see alike: the ratio of KV compression is decided by the spans, not by the rule."""
        return self == other or (self.uses_sentinels and replace(self, ratio=other.ratio, seed=other.seed) == other)

    def with_seed(self, seed: int) -> "Rule":
        """The same rule with another draw."""
        return replace(self, seed=seed)

    def kinds(self, input_ids: Tensor, read: Read) -> Tensor:
        """What to remember of new tokens, long `(batch, new)`."""
        return torch.zeros_like(input_ids)

    def sees(self, held: Held, new: int) -> Tensor:
        """Which keys the last `new` of those held see, bool `(batch, new, keys)`, padding aside."""
        return _last_rows(causal, held.kinds, new)

    def may_drop(self, held: Held, new: int) -> bool:
        """Whether reading the last `new` can have put a key out of every later token's sight."""
        return False

    def settled(self, held: Held) -> Held:
        """What the keys held are once all of them have been read."""
        return held

    def keeps(self, held: Held, text_read: Tensor) -> Tensor:
        """Which of the settled keys a token behind `text_read` `(batch,)` text tokens may see, bool `(batch, keys)`."""
        return torch.ones_like(held.kinds, dtype=torch.bool)


def _last_rows(rule: MaskMod, kinds: Tensor, new: int) -> Tensor:
    """The rows of a rule's dense mask for the last `new` queries."""
    batch, keys = kinds.shape
    return _rows(rule, batch, keys, keys - new, kinds.device)


class KVCompression(Rule):
    """Spans between sentinels are compressed into their <CR> (`kv_compression`)."""

    name = "kv_compression"
    uses_sentinels = True

    def mask_mod(self, input_ids: Tensor) -> MaskMod:
        return kv_compression(
            input_ids,
            self.cl_id,
            self.cr_id,
            sink_tokens=self.sink_tokens,
            cr_tokens=self.cr_tokens,
            cr_visibility=self.cr_visibility,
            recent_tokens=self.recent_tokens,
        )

    def key_order(self, input_ids: Tensor) -> Tensor:
        _, last = span_bounds(input_ids, self.cl_id, self.cr_id, self.cr_tokens)
        lasting = (input_ids == self.cr_id) | ((last < 0) & (input_ids != self.cl_id))
        return (~lasting).long().argsort(dim=-1, stable=True)

    def removed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        _, last = span_bounds(input_ids, self.cl_id, self.cr_id, self.cr_tokens)
        text = self.text(input_ids, attention_mask)
        positions, read = count_text(text), text.sum(-1, keepdim=True)
        gone = text & (last >= 0) & (positions >= self.sink_tokens) & (positions + self.recent_tokens < read)
        return gone.sum(-1) - (input_ids == self.cr_id).sum(-1)

    def kinds(self, input_ids: Tensor, read: Read) -> Tensor:
        is_cl, is_cr = input_ids == self.cl_id, input_ids == self.cr_id
        opened = read.open[:, None] | (is_cl.cumsum(-1) > 0)
        stray = is_cr & read.began[:, None] & ~opened
        return torch.where(stray, STRAY, is_cl * CL + is_cr * CR)

    def sees(self, held: Held, new: int) -> Tensor:
        kinds = held.kinds
        alone = kinds == STRAY  # as a query; as a key it is like any <CR>
        asks = ~(alone | (kinds == CL) | (kinds == CR))
        if self.cr_visibility == "context":
            asks |= alone | (kinds == CR)
        return _last_rows(self._lifetimes(held).rule(asks), kinds, new)

    def _lifetimes(self, held: Held) -> _Lifetimes:
        kinds, positions, starts = held
        leaving = kinds == LEAVING
        # A <CR> is no text, so it is no sink, whatever its position.
        of_text = torch.where((kinds == COMPRESSED) | (kinds == STRAY), NEVER, positions)
        options = (self.sink_tokens, self.cr_tokens, self.recent_tokens)
        found = _lifetimes(kinds, CL, CR, of_text, *options, starts, leaving, kinds == GONE)
        return found._replace(times=positions + (kinds == CR) + (kinds == STRAY))

    def may_drop(self, held: Held, new: int) -> bool:
        kinds = held.kinds
        leaving = kinds == LEAVING if self.recent_tokens else torch.zeros_like(kinds[:, :1], dtype=torch.bool)
        recent = kinds if self.cr_tokens > 1 else kinds[:, -new:]
        return bool(leaving.any() | (recent == CR).any() | (recent == STRAY).any())

    def settled(self, held: Held) -> Held:
        kinds = held.kinds
        _, last = span_bounds(kinds, CL, CR, self.cr_tokens, kinds == GONE)
        closed = last >= 0
        if self.cr_tokens > 1:  # more of a span's <CR> may be to come while nothing else has been read
            index = torch.arange(kinds.shape[1], device=kinds.device).expand_as(kinds)
            at_end = torch.cummin(((kinds == CR) | (kinds == GONE)).flip(-1).long(), -1).values.flip(-1).bool()
            at_end = at_end & (kinds == CR)
            run = at_end.sum(-1, keepdim=True)
            head = torch.where(at_end, index, kinds.shape[1]).amin(-1, keepdim=True)
            closed = closed & ~((run < self.cr_tokens) & (last == head))
        starts = torch.where(closed & (kinds == CR), self._lifetimes(held).starts, held.starts)
        text = kinds == TEXT
        sinks = text & (held.positions < self.sink_tokens)
        settled = torch.where(closed & text & ~sinks, LEAVING, kinds)
        settled = torch.where((closed & (kinds == CR)) | (kinds == STRAY), COMPRESSED, settled)
        settled = torch.where(closed & (kinds == CL), GONE, settled)
        return Held(settled, held.positions, starts)

    def keeps(self, held: Held, text_read: Tensor) -> Tensor:
        expired = (held.kinds == LEAVING) & (held.positions + self.recent_tokens < text_read[:, None])
        return ~expired & (held.kinds != GONE)


class LocalAttention(Rule):
    """Only the most recent share of the keys is kept (`local_attention`)."""

    name = "local_attention"

    def mask_mod(self, input_ids: Tensor) -> MaskMod:
        return local_attention(input_ids.shape[-1], self.ratio, input_ids.device)

    def removed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        batch, length = input_ids.shape
        return torch.full_like(input_ids[:, 0], int((length - 1) * self.ratio))

    def sees(self, held: Held, new: int) -> Tensor:
        first = self._first(held.positions[:, -new:])
        return _last_rows(causal, held.kinds, new) & (first[:, :, None] <= held.positions[:, None, :])

    def may_drop(self, held: Held, new: int) -> bool:
        return True

    def keeps(self, held: Held, text_read: Tensor) -> Tensor:
        return self._first(text_read[:, None]) <= held.positions

    def _first(self, positions: Tensor) -> Tensor:
        """The first position that a query sees; in double precision, which not every device has."""
        return (positions.cpu().double() * self.ratio).floor().long().to(positions.device)


class SinkAttention(Rule):
    """The first few and the most recent keys are kept (`sink_attention`)."""

    name = "sink_attention"

    @property
    def sinks(self) -> int:
        """How many of the first keys are kept."""
        return self.sink_tokens or SINKS

    def mask_mod(self, input_ids: Tensor) -> MaskMod:
        return sink_attention(input_ids.shape[-1], self.ratio, self.sinks, input_ids.device)

    def removed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        length = input_ids.shape[-1]
        sinks, recent = _sinks_and_recent(torch.tensor([length - 1]), self.ratio, self.sinks)
        return torch.full_like(input_ids[:, 0], int(recent - sinks))

    def sees(self, held: Held, new: int) -> Tensor:
        positions = held.positions
        sinks, recent = _sinks_and_recent(positions[:, -new:], self.ratio, self.sinks)
        sinks, recent = sinks.to(positions.device)[:, :, None], recent.to(positions.device)[:, :, None]
        keys = positions[:, None, :]
        return _last_rows(causal, held.kinds, new) & ((keys < sinks) | (keys >= recent))

    def may_drop(self, held: Held, new: int) -> bool:
        return True

    def keeps(self, held: Held, text_read: Tensor) -> Tensor:
        _, recent = _sinks_and_recent(text_read[:, None], self.ratio, self.sinks)
        return (held.positions < self.sinks) | (held.positions >= recent.to(held.positions.device))


class ScatteredAttention(Rule):
    """A random share of the keys is kept (`scattered_attention`, drawn by `draw_keys`)."""

    name = "scattered_attention"

    def mask_mod(self, input_ids: Tensor) -> MaskMod:
        return scattered_attention(draw_keys(input_ids, self.ratio, self.seed))

    def removed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return (~draw_keys(input_ids, self.ratio, self.seed))[:, :-1].sum(-1)  # the last token sees itself

    def kinds(self, input_ids: Tensor, read: Read) -> Tensor:
        return (~draw_keys(input_ids, self.ratio, self.seed, read)) * UNDRAWN

    def sees(self, held: Held, new: int) -> Tensor:
        return _last_rows(scattered_attention(held.kinds != UNDRAWN), held.kinds, new)

    def may_drop(self, held: Held, new: int) -> bool:
        return bool((held.kinds[:, -new:] == UNDRAWN).any())

    def keeps(self, held: Held, text_read: Tensor) -> Tensor:
        return held.kinds != UNDRAWN


class TextOnly(Rule):
    """Full causal attention as if there were no sentinels (`text_only`): what a teacher without adapters sees."""

    def mask_mod(self, input_ids: Tensor) -> MaskMod:
        return text_only(is_text(input_ids, self.cl_id, self.cr_id))


METHODS: dict[str, type[Rule]] = {
    rule.name: rule for rule in (Rule, KVCompression, LocalAttention, ScatteredAttention, SinkAttention)
}


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
    """Count what `rule` keeps and sees on blocks `(batch, length)`, padded on the right.

    A cache holds a key as long as the token being read or a later one sees it: a span that is still being read, its
    <CL> too, counts in full. `most_kept` is the largest such number. (This project.)
    """
    text = rule.text(input_ids, attention_mask)
    mask = dense_mask(rule.visible(input_ids, attention_mask), *input_ids.shape, input_ids.device)
    own = mask.diagonal(dim1=1, dim2=2)
    per_query = mask.sum(-1) - own.long()
    readers = mask if attention_mask is None else mask & attention_mask.bool()[:, :, None]
    seen_from_here = readers.flip(1).to(torch.int8).cummax(1).values.flip(1)
    seen_from_here.diagonal(dim1=1, dim2=2).fill_(1)  # a token's own key is there while it is read
    held = torch.tril(seen_from_here).sum(-1) * text
    num_text = text.sum(-1)
    return MaskCost(
        text_tokens=int(num_text.sum()),
        removed=int(rule.removed(input_ids, attention_mask).sum()),
        attended_pairs=int((per_query * text).sum()),
        causal_pairs=int((num_text * (num_text - 1) // 2).sum()),
        kept_keys=int(held.sum()),
        most_kept=int(held.max()),
    )
