"""KV compression with sentinel tokens: the paper's method, with this project's options."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kv_compression.methods.rule import NEVER, History, MaskMod, Rule, Tokens
from kv_compression.methods.sentinels import span_bounds

CR_VISIBILITIES = ("span", "context")
FARTHEST = NEVER // 2  # a window this wide never ends

# The kinds of a token. STRAY: a <CR> that closes an empty span. SUMMARY: a <CR> whose span is closed. EXPIRING: text of
# a closed span. DROPPED: a <CL> whose span is closed, and padding.
TEXT, CL, CR, SUMMARY, STRAY, EXPIRING, DROPPED = range(7)


@dataclass(frozen=True)
class KVCompression(Rule):
    """Spans between sentinels are compressed into their <CR>; drawn for `a b < c d > e`, < being <CL> and > <CR>.

            a b < c d > e
        a   1
        b   1 1
        <   . . 1
        c   1 1 . 1
        d   1 1 . 1 1
        >   . . 1 1 1 1
        e   1 1 . . . 1 1

    The options are this project's, and off by default:
    - `sink_tokens`: a block's first so many text tokens are seen by every later token, even if they are in a span;
    - `cr_tokens`: so many <CR> in a row close a span; each sees the span and the earlier ones of its own;
    - `cr_visibility` "context": a <CR> also sees what text in its place would, earlier <CR> and uncompressed text;
    - `recent_tokens`: text sees a token of a closed span until so many text tokens have been read after it, and the
      span's <CR> only once its first token has left.

    (Paper, section 3.)
    """

    sink_tokens: int = 0
    cr_tokens: int = 1
    cr_visibility: str = "span"
    recent_tokens: int = 0

    name = "kv_compression"
    label = "KV compression"
    colour = "#D55E00"
    marker = "o"
    card = (
        "A span of text is wrapped in two new tokens, `<CL>` (id {cl_id}) and `<CR>` (id {cr_id}). `<CR>` sees its own "
        "span; later tokens see `<CR>` and never the span again, so that the span's keys and values leave the cache "
        "and those of `<CR>` stay. The tokenizer here has both tokens. What they do is the mask's doing, not the "
        "weights': plain transformers takes them for words."
    )
    uses_sentinels = True
    num_kinds = DROPPED + 1

    def __post_init__(self):
        super().__post_init__()
        if self.cr_visibility not in CR_VISIBILITIES:
            raise ValueError(f"cr_visibility must be one of {', '.join(CR_VISIBILITIES)}, got {self.cr_visibility}")
        if self.sink_tokens < 0 or self.recent_tokens < 0 or self.cr_tokens < 1:
            raise ValueError("sink_tokens and recent_tokens must be at least 0, cr_tokens at least 1")

    def remember(self, input_ids: Tensor, real: Tensor | None, history: History) -> tuple[Tensor, History]:
        is_cl, is_cr = input_ids == self.cl_id, input_ids == self.cr_id
        opened = history.open[:, None] | (is_cl.cumsum(-1) > 0)
        stray = is_cr & history.began[:, None] & ~opened
        kinds = torch.where(stray, STRAY, is_cl * CL + is_cr * CR)
        kinds = kinds if real is None else torch.where(real, kinds, DROPPED)
        sentinel = (kinds != TEXT) & (kinds != DROPPED)
        return kinds, history._replace(began=history.began | sentinel.any(-1))

    def sees(self, tokens: Tokens) -> MaskMod:
        return self.lifetimes(tokens).rule()

    def lifetimes(self, tokens: Tokens) -> "Lifetimes":
        """When every key is seen, from a token's kind and position: the one definition of the method."""
        kinds, positions, visible_from, ignored, _ = tokens
        index = torch.arange(kinds.shape[-1], device=kinds.device).expand_as(kinds)
        is_cl, is_cr, alone = kinds == CL, kinds == CR, kinds == STRAY
        between = ~(is_cl | is_cr)
        first, last = span_bounds(kinds, CL, CR, self.cr_tokens, ignored)
        closed = last >= 0
        first_text = first + is_cl.gather(-1, first.clamp(min=0))
        first_visible = torch.where(is_cr, first, torch.where(between & closed, first_text, index))
        asks = ~is_cl if self.cr_visibility == "context" else between & ~alone
        sinks = (kinds == TEXT) & (positions < self.sink_tokens) if self.sink_tokens else None
        closed_kinds = torch.where(self.leaves(tokens, closed), EXPIRING, kinds)
        permanent = (closed_kinds < EXPIRING) & ~is_cl
        if not self.recent_tokens:
            return Lifetimes(first_visible, asks, sinks, permanent)

        recent = min(self.recent_tokens, FARTHEST)
        # A <CR> stands in for its span once the first of its tokens has left; an empty span has none to wait for.
        real_text = between if ignored is None else between & ~ignored
        next_text = torch.where(real_text, index, kinds.shape[-1] - 1).flip(-1).cummin(-1).values.flip(-1)
        start = next_text.gather(-1, first_text.clamp(min=0))
        waits = is_cr & (start < last) & (positions.gather(-1, last.clamp(min=0)) >= self.sink_tokens)
        first_to_leave = positions.gather(-1, start).clamp(min=self.sink_tokens)
        begin = torch.where(waits, first_to_leave + recent + 1, visible_from)
        end = self.visible_until(closed_kinds, positions).masked_fill(is_cl, -1)
        query_time = positions + (is_cr | alone)  # a <CR> asks for what the text after it would see
        return Lifetimes(first_visible, asks, sinks, permanent, query_time, begin, end)

    def leaves(self, tokens: Tokens, closed: Tensor) -> Tensor:
        """Which text leaves with its span once that is `closed` (bool): all but the sinks."""
        leaves = closed & (tokens.kinds == TEXT)
        return leaves & (tokens.positions >= self.sink_tokens) if self.sink_tokens else leaves

    def visible_until(self, kinds: Tensor, positions: Tensor) -> Tensor:
        """The last text position that sees a key whose kind says that its span is closed, long `(batch, length)`.

        NEVER for a key that stays. An open span stays too: its <CR> is still to come.
        """
        last = positions + min(self.recent_tokens, FARTHEST)
        return last.masked_fill(kinds < EXPIRING, NEVER).masked_fill(kinds == DROPPED, -1)

    def settled(self, tokens: Tokens) -> Tokens:
        kinds, visible_from = tokens.kinds, tokens.visible_from
        _, last = span_bounds(kinds, CL, CR, self.cr_tokens, tokens.ignored)
        closed = last >= 0
        if self.cr_tokens > 1:  # more of a span's <CR> may come as long as nothing else has been read
            index = torch.arange(kinds.shape[1], device=kinds.device).expand_as(kinds)
            at_end = torch.cummin(((kinds == CR) | (kinds == DROPPED)).flip(-1).long(), -1).values.flip(-1).bool()
            at_end = at_end & (kinds == CR)
            run = at_end.sum(-1, keepdim=True)
            head = torch.where(at_end, index, kinds.shape[1]).amin(-1, keepdim=True)
            closed = closed & ~((run < self.cr_tokens) & (last == head))
        if self.recent_tokens:
            found = self.lifetimes(tokens).visible_from
            visible_from = torch.where(closed & (kinds == CR), found, visible_from)
        settled = torch.where(self.leaves(tokens, closed), EXPIRING, kinds)
        settled = torch.where((closed & (kinds == CR)) | (kinds == STRAY), SUMMARY, settled)
        settled = torch.where(closed & (kinds == CL), DROPPED, settled)
        return tokens._replace(kinds=settled, visible_from=visible_from)

    def keeps(self, tokens: Tokens, history: History) -> Tensor:
        return self.visible_until(tokens.kinds, tokens.positions) >= history.text_read[:, None]

    def is_quiet(self, tokens: Tokens, history: History) -> bool:
        lasting = (tokens.kinds == TEXT) | (tokens.kinds == SUMMARY)
        return bool((lasting & (tokens.visible_from <= history.text_read[:, None])).all())

    def is_open(self, tokens: Tokens) -> Tensor:
        """Whether a span is open at the end of settled tokens, bool `(batch,)`."""
        return ((tokens.kinds == CL) | (tokens.kinds == CR)).any(-1)

    def key_order(self, input_ids: Tensor) -> Tensor:
        permanent = self.lifetimes(self.tokens(input_ids)).permanent
        return (~permanent).long().argsort(dim=-1, stable=True)


class Lifetimes(NamedTuple):
    """From when until when text sees a key, all `(batch, length)`.

    A query sees every key from index `first_visible[q]` on, and every sink. A query that `asks` sees besides the keys
    that are `permanent`, or, where there is a window, those with visible_from[k] ≤ query_time[q] ≤ visible_until[k].
    """

    first_visible: Tensor
    asks: Tensor
    sinks: Tensor | None
    permanent: Tensor
    query_time: Tensor | None = None
    visible_from: Tensor | None = None
    visible_until: Tensor | None = None

    def rule(self) -> MaskMod:
        """The rule that these lifetimes make."""
        # Small integers, and arithmetic in place of comparisons: torch compares broadcast integers ten times slower.
        windowed = self.query_time is not None
        dtype = torch.int16 if self.asks.shape[-1] < 2**14 and not windowed else torch.int32
        before_visible, asks = (self.first_visible - 1).to(dtype), self.asks.to(torch.int8)
        permanent, sinks = self.permanent.to(torch.int8), self.sinks
        if windowed:
            before, at, after = (self.visible_from - 1).int(), self.query_time.int(), (self.visible_until + 1).int()

        def rule(b, h, q, k):
            seen = (k.to(dtype) - before_visible[b, q]).clamp(min=0).bool()
            if windowed:
                in_time = (at[b, q] - before[b, k]).clamp(0, 1) * (after[b, k] - at[b, q]).clamp(0, 1)
                seen = seen | (in_time * asks[b, q]).bool()
            else:
                seen = seen | (asks[b, q] * permanent[b, k]).bool()
            if sinks is not None:
                seen = seen | sinks[b, k]
            return (k <= q) & seen

        return rule
