"""<CL> and <CR> in a tokenizer and in a model's embeddings."""

import torch

CL_TOKEN = "<CL>"


CR_TOKEN = "<CR>"


def unended(tokenizer, text: str) -> list[int]:
    """The token ids of a text that is to be continued: without what the tokenizer puts after a text.

    A tokenizer may end every text with end-of-text; what it puts before a text stays. (This project.)
    """
    ids = tokenizer(text)["input_ids"]
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    for first in range(len(ids) - len(plain) + 1):
        if ids[first : first + len(plain)] == plain:
            return ids[: first + len(plain)]
    return plain


def add_sentinels(tokenizer, model=None, cr_like: str | None = None) -> tuple[int, int]:
    """Make <CL> and <CR> known to a tokenizer and a model; returns `(cl_id, cr_id)`.

    Whether the model's rows have been set is read from the model, not from the tokenizer: see `unset_rows`. Rows that
    have been set, trained ones among them, are left alone. The embedding matrix grows only when it has no row for them
    (many models carry spare rows). The others start as the mean of the rows in use, in the input embedding and, where
    it is a matrix of its own, in the output embedding; with `cr_like`, a text such as ".", the input embedding of <CR>
    starts as that of the text's last token. Nothing here makes them trainable: see
    `model.lora`. Raises ValueError where they cannot be set (offloaded or quantized embeddings). (Paper,
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
    if cr_like is not None and cr_id in unset:
        weight = plain(model.get_input_embeddings()).weight
        with torch.no_grad():
            weight[cr_id] = weight[tokenizer(cr_like, add_special_tokens=False)["input_ids"][-1]]
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


def restore_rows(model, cl_id: int, cr_id: int, merged: bool) -> None:
    """Give a model's embeddings the rows for <CL> and <CR> that it had in its run.

    The adapter holds what they have learnt: in the input embedding, and in the output embedding where the two are
    tied. An output embedding of its own keeps its initial rows, which no adapter holds. `merged` weights hold
    everything. Rows that were set before are left alone.
    """
    ids = (cl_id, cr_id)
    unset = unset_rows(model, *ids)
    if not unset:
        return
    refuse_unwritable(model)
    grown = make_room(model, *ids)
    embedding, head = (plain(part) for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    if grown:
        start_at_mean(embedding, unset, ids)
    own_head = head is not None and head.weight is not embedding.weight
    if own_head and not merged:
        start_at_mean(head, unset, ids)
    mark_rows(model, *ids)


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
