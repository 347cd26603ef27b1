"""The sentinel tokens <CL> and <CR>: in token sequences, in a tokenizer and in a model's embeddings.

Knows which token is a sentinel, where a span lies in a token sequence, which position id and which target every
token gets. Knows nothing about who may see whom: that is `visibility`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CL_TOKEN = "<CL>"
CR_TOKEN = "<CR>"
IGNORED = -100  # the target that torch's cross entropy skips


def unended(tokenizer, text: str) -> list[int]:
    """A text's token ids, to be continued: as the tokenizer makes them, without what it puts behind a text.

    A tokenizer may end every text with end-of-text; what it puts before a text stays. (This project.)
    """
    ids = tokenizer(text)["input_ids"]
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    for first in range(len(ids) - len(plain) + 1):
        if ids[first : first + len(plain)] == plain:
            return ids[: first + len(plain)]
    return plain


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
    and text behind a <CL> that is never closed. A <CL> that is not followed by a <CR> before the next <CL> opens
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
    """A copy of `tokens` (token ids or words) with `cl` before and `cr` behind every inclusive `(first, last)` span.

    `spans` must be sorted and must not overlap. `cr` is put there `cr_tokens` times.
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


def add_sentinels(tokenizer, model=None) -> tuple[int, int]:
    """Make <CL> and <CR> known to a tokenizer and a model; returns `(cl_id, cr_id)`.

    Whether the model's rows have been set is read from the model, not from the tokenizer: see `unset_rows`. Rows that
    have been set, trained ones among them, are left alone. The embedding matrix grows only when it has no row for them
    (many models carry spare rows). The others start as the mean of the rows in use, in the input embedding and, where
    it is a matrix of its own, in the output embedding. Nothing here makes them trainable: see
    `training.lora_config`. Raises ValueError where they cannot be set (offloaded or quantized embeddings). (Paper,
    section 4.1, for the new tokens; this project for their initial value.)
    """
    new = [token for token in (CL_TOKEN, CR_TOKEN) if token not in tokenizer.get_vocab()]
    if new and model is not None:
        refuse_unwritable(model)
    tokenizer.add_tokens(new, special_tokens=True)
    cl_id, cr_id = tokenizer.convert_tokens_to_ids([CL_TOKEN, CR_TOKEN])
    unset = [] if model is None else unset_rows(model, cl_id, cr_id)
    if not unset:
        return cl_id, cr_id
    refuse_unwritable(model)
    make_room(model, cl_id, cr_id)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        if embedding is not None:
            rows = [number for number in unset if number not in trained_rows(embedding)]
            start_at_mean(plain(embedding), rows, (cl_id, cr_id))
    mark_rows(model, cl_id, cr_id)
    return cl_id, cr_id


FEW = 16  # special tokens with which a vocabulary may begin
MARK = "sentinel_rows"  # in a model's configuration, and so in config.json wherever the model is saved


def unset_rows(model, *ids: int) -> list[int]:
    """Those of these token ids that the model has no row for, or a row that was never set.

    A spare row, or one that `resize_token_embeddings` has made, looks like any other: so the ids of the rows that were
    set stand in the model's configuration, which is saved and loaded with the weights.
    """
    rows = plain(model.get_input_embeddings()).weight.shape[0]
    known = getattr(model.config, MARK, None) or []
    return [number for number in ids if number >= rows or number not in known]


def mark_rows(model, *ids: int) -> None:
    """Note in the model's configuration that the rows of these token ids have been set."""
    setattr(model.config, MARK, sorted({*(getattr(model.config, MARK, None) or []), *ids}))


def plain(module):
    """The module itself, where peft has put wrappers around it."""
    while module is not None:
        inner = getattr(module, "original_module", None) or getattr(module, "base_layer", None)
        if inner is None:
            break
        module = inner
    return module


def trained_rows(embedding) -> set[int]:
    """The rows of an embedding that an adapter around it replaces by its own, whatever the matrix holds."""
    adapter = getattr(embedding, "token_adapter", embedding)
    return {row for rows in getattr(adapter, "token_indices", {}).values() for row in rows}


def refuse_unwritable(model) -> None:
    """ValueError if the rows of an embedding cannot be set."""
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = None if embedding is None else plain(embedding).weight
        if weight is not None and (weight.is_meta or not weight.is_floating_point()):
            what = "offloaded" if weight.is_meta else "quantized"
            raise ValueError(f"the model's embedding is {what}: add the sentinels (attach) before that")


def make_room(model, cl_id: int, cr_id: int) -> bool:
    """Let the embedding matrix grow if it has no rows for <CL> and <CR>; returns whether it had to.

    ValueError if it cannot, because peft has wrapped it.
    """
    rows, embedding = max(cl_id, cr_id) + 1, model.get_input_embeddings()
    found = plain(embedding).weight.shape[0]
    if rows <= found:
        return False
    if plain(embedding) is not embedding:
        raise ValueError(
            f"the embedding has {found} rows, none for <CL> and <CR>, and cannot grow inside peft's wrapper: attach "
            "before the adapter is put on"
        )
    model.resize_token_embeddings(rows, mean_resizing=False)
    return True


@torch.no_grad()
def start_at_mean(embedding, rows: list[int], sentinels: tuple[int, int]) -> None:
    """Set these rows of an embedding to the mean of the rows in use. Repeating it on tied weights changes nothing.

    In use are the rows before those of the `sentinels`, or all others where these are among a vocabulary's first.
    """
    if not rows:
        return
    weight, bias, first = embedding.weight, getattr(embedding, "bias", None), min(sentinels)
    used = torch.arange(len(weight), device=weight.device)
    used = used[:first] if first >= FEW else used[~torch.isin(used, used.new_tensor(sentinels))]
    weight[rows] = weight[used].mean(0, dtype=torch.float32).to(weight.dtype)
    if bias is not None:
        bias[rows] = bias[used].mean()
