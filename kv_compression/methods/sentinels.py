"""The sentinel tokens <CL> and <CR>: in token sequences, in a tokenizer and in a model's embeddings.

Knows which token is a sentinel, where a span lies in a token sequence, which position id and which target every
token gets. Knows nothing about who may see whom: that is `rule`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = -100  # the target that torch's cross entropy skips


def is_text(input_ids: Tensor, cl_id: int, cr_id: int) -> Tensor:
    """True where a token is neither <CL> nor <CR>; same shape as `input_ids`."""
    return (input_ids != cl_id) & (input_ids != cr_id)


def count_text(text: Tensor) -> Tensor:
    """Position ids from a bool `(batch, length)` mask of text tokens: they count 0, 1, 2 …, all else repeats."""
    return (text.long().cumsum(-1) - 1).clamp(min=0)


def position_ids(input_ids: Tensor, cl_id: int, cr_id: int) -> Tensor:
    """Position ids, long `(batch, length)`: text tokens count without gaps, a sentinel adds none.

    A sentinel has the position id of the token before it, 0 at the start of the block. (Paper, section 3.)
    """
    return count_text(is_text(input_ids, cl_id, cr_id))


def next_text_token(input_ids: Tensor, cl_id: int, cr_id: int) -> Tensor:
    """Targets, long `(batch, length)`, aligned with the logits (not shifted).

    A text token's target is the next text token, whatever sentinels lie between; sentinels and a block's last text
    token have none (-100). (Paper, section 3.)
    """
    length = input_ids.shape[-1]
    text = is_text(input_ids, cl_id, cr_id)
    index = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    at_or_after = torch.where(text, index, length).flip(-1).cummin(-1).values.flip(-1)
    after = torch.cat([at_or_after[..., 1:], torch.full_like(at_or_after[..., :1], length)], dim=-1)
    targets = input_ids.gather(-1, after.clamp(max=length - 1))
    return targets.masked_fill(~text | (after == length), IGNORED)


def span_bounds(
    input_ids: Tensor, cl_id: int, cr_id: int, cr_tokens: int = 1, ignored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Where the span that each token belongs to begins and ends: two long tensors `(batch, length)`.

    For every token of a span, its <CL> and its <CR> too, `first` is the index of the <CL> (0 where the block begins
    inside the span) and `last` the index of the <CR>. Both are -1 for a token that is in no span: text between spans
    and text after a <CL> that is never closed. A <CL> that is not followed by a <CR> before the next <CL> opens
    nothing; a <CR> that no <CL> opens closes an empty span, unless it is the block's first sentinel.

    Where a span is closed by `cr_tokens` <CR> in a row they all belong to it, and `last` is the index of the first.
    `ignored` tokens, bool `(batch, length)`, may stand between them.
    """
    length = input_ids.shape[-1]
    index = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    opens, closes = input_ids == cl_id, input_ids == cr_id
    sentinel = opens | closes
    if cr_tokens > 1:
        rank = _rank_in_row(closes, ignored)
        head = torch.where(closes & (rank == 0), index, -1).cummax(-1).values
        follows = closes & (rank > 0) & (rank < cr_tokens)
        closes = closes & ~follows
    at_or_before = torch.where(sentinel, index, -1).cummax(-1).values
    before = torch.cat([torch.full_like(index[..., :1], -1), at_or_before[..., :-1]], dim=-1)
    at_or_after = torch.where(sentinel, index, length).flip(-1).cummin(-1).values.flip(-1)
    after = torch.cat([at_or_after[..., 1:], torch.full_like(index[..., :1], length)], dim=-1)

    # A <CL> is its own opening sentinel, a <CR> its own closing one.
    opening = torch.where(opens, index, before)
    closing = torch.where(closes, index, after)
    opened = (opening < 0) | opens.gather(-1, opening.clamp(min=0))
    closed = (closing < length) & closes.gather(-1, closing.clamp(max=length - 1))
    inside = opened & closed
    stray = closes & ~opened
    first = torch.where(inside, opening.clamp(min=0), torch.where(stray, index, -1))
    last = torch.where(inside, closing, torch.where(stray, index, -1))
    if cr_tokens > 1:
        head = torch.where(follows, head, index)
        first, last = first.gather(-1, head), last.gather(-1, head)
    return first, last


def _rank_in_row(closes: Tensor, ignored: Tensor | None) -> Tensor:
    """The number, from 0, of every <CR> among those that stand in a row."""
    count = closes.long().cumsum(-1)
    others = ~closes if ignored is None else ~(closes | ignored)
    return count - torch.where(others, count, 0).cummax(-1).values - 1


def insert_sentinels(tokens: Sequence, spans: Sequence[tuple[int, int]], cl, cr, cr_tokens: int = 1) -> list:
    """A copy of `tokens` (token ids or words) with `cl` before and `cr` after every inclusive `(first, last)` span.

    `spans` must be sorted and must not overlap. `cr` is inserted `cr_tokens` times.
    """
    out, done = [], 0
    for first, last in spans:
        out.extend(tokens[done:first])
        out.append(cl)
        out.extend(tokens[first : last + 1])
        out.extend([cr] * cr_tokens)
        done = last + 1
    out.extend(tokens[done:])
    return out
