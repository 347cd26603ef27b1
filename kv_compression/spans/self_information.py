"""The self-information of every token, and where phrases and sentences begin.

A token's self-information is −log p under the frozen base model: what the model predicts anyway need not be kept
verbatim. (Li et al. 2023, Selective Context, drop such units from a prompt; here they are compressed first.)
"""

import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from tqdm.auto import tqdm

from kv_compression.io.errors import UsageError, one_line
from kv_compression.io.machine import find_spacy_model, missing_spacy
from kv_compression.io.tensor_files import cached_tensors, digest
from kv_compression.methods.sentinels import IGNORED
from kv_compression.model.architectures import decoder_of, input_device
from kv_compression.model.attention import check_positions
from kv_compression.model.loss import TokenLosses
from kv_compression.settings import SPAN_UNITS

SPACY_CHARACTERS = 100_000  # that spaCy parses at once: it takes about 10 KB of memory a character

Offsets = list[tuple[int, int]]


@torch.no_grad()
def self_information(model, tokens: Tensor, batch_size: int = 8) -> Tensor:
    """−log p of every token in nats, given the text before it in its block; float32, shape of `tokens`, on the CPU.

    `tokens` is long `(blocks, length)`. The model uses its own attention, so it must not be patched. Nothing predicts
    the first token of a block: it gets the largest value in the block, and is compressed last. UsageError for blocks
    that are longer than the model has positions.
    """
    information = torch.zeros(tokens.shape)
    length = tokens.shape[1]
    check_positions(decoder_of(model), length, lambda: length)
    training = model.training
    token_losses = TokenLosses(model).eval()
    device = input_device(model)
    try:
        for start in tqdm(range(0, len(tokens), batch_size), desc="scoring self-information", leave=False):
            input_ids = tokens[start : start + batch_size].to(device)
            labels = torch.full_like(input_ids, IGNORED)
            labels[:, :-1] = input_ids[:, 1:]
            information[start : start + batch_size, 1:] = token_losses(labels, input_ids=input_ids)[:, :-1].cpu()
    finally:
        model.train(training)
    information[:, 0] = information.amax(1)
    return information


def cached_self_information(model, model_identity: str, tokens: Tensor) -> Tensor:
    """`self_information`, cached on disk by tokens and `model_identity`, which names weights and precision."""
    key = {"model": model_identity, "tokens": digest(tokens)}
    scores = cached_tensors("self_information", key, lambda: {"information": self_information(model, tokens)})
    return scores["information"]


def informant(model):
    """A function from a text's token ids (a list) to their `self_information`, a numpy array."""
    return lambda tokens: self_information(model, torch.tensor([tokens]))[0].numpy()


def unit_starts(
    texts: list[str], offsets: list[Offsets], unit: str, spacy_model: str | None = None
) -> list[list[bool]]:
    """Whether each token begins a unit of its text, for texts and the `(start, end)` offsets of their tokens.

    The unit is a "token", a "sentence" as spaCy finds it, or a "phrase": a noun chunk of spaCy's, or a word outside
    noun chunks. (Li et al. 2023.) A token belongs to the unit of its first character that is not a space, a token of
    spaces to the unit that follows: byte-level tokens begin with the space before a word. `spacy_model` is the parser,
    an installed `en_core_web_sm*` by default. UsageError if spaCy or its model is needed and missing.
    """
    if unit not in SPAN_UNITS:
        raise UsageError(f"--span_unit {unit}: choose from {', '.join(SPAN_UNITS)}")
    if unit == "token":
        return [[True] * len(own) for own in offsets]
    nlp = _load_spacy(unit, find_spacy_model(unit, spacy_model))
    return [
        _starts(text, own, _beginnings(nlp, text, unit))
        for text, own in zip(tqdm(texts, desc=f"finding every {unit}", leave=False), offsets, strict=True)
    ]


@cache
def _load_spacy(unit: str, model: str):
    """A spaCy pipeline. spaCy is an optional extra, imported only if it is needed."""
    try:
        import spacy

        return spacy.load(model, disable=["ner", "lemmatizer"])
    except (ImportError, OSError, ValueError) as error:
        raise missing_spacy(unit, model, one_line(error)) from error


def _beginnings(nlp, text: str, unit: str) -> list[int]:
    """The positions in `text` at which a unit begins, ascending."""
    found = []
    for start, piece in _pieces(text):
        document = nlp(piece)
        if unit == "sentence":
            found += [start + sentence.start_char for sentence in document.sents]
        else:
            inside = {token.i for chunk in document.noun_chunks for token in chunk[1:]}
            found += [start + token.idx for token in document if token.i not in inside]
    return found


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """A text in pieces that spaCy can parse, with their positions: cut after a line or, failing that, a word."""
    start = 0
    while start < len(text):
        end = start + SPACY_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or text.rfind(" ", start, end) + 1 or end
        yield start, text[start:end]
        start = end


_VISIBLE = re.compile(r"\S")


def _starts(text: str, offsets: Offsets, beginnings: list[int]) -> list[bool]:
    """Whether each token is the first of its unit."""
    found, before = [], None
    for start, _ in offsets:
        character = _VISIBLE.search(text, start)
        unit = bisect_right(beginnings, character.start() if character else len(text))
        found.append(unit != before)
        before = unit
    return found
