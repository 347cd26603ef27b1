"""Nucleus sampling on a compressed cache: documents to prefixes to continuations.

A prefix is read once, in chunks, and its continuations share what the cache kept of it. What is sampled for a document
depends on the seed and the document's number alone, so an interrupted run continues as if it had not been.
"""

import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TopPLogitsWarper

from kv_compression.data.blocks import mark_words
from kv_compression.generation.words import WORD
from kv_compression.io.errors import UsageError
from kv_compression.methods.rule import Rule
from kv_compression.methods.sentinels import insert_sentinels
from kv_compression.model.budget import Budget
from kv_compression.model.cache import SentinelCache
from kv_compression.model.parts import input_device
from kv_compression.model.vocabulary import CL_TOKEN, CR_TOKEN, unended
from kv_compression.spans.plan import SpanPlan
from kv_compression.spans.self_information import unit_starts

CHECK_EVERY = 8  # steps between looks at whether all continuations have their words
TOKENS_PER_WORD = 4  # where a continuation without its words is given up: text takes 1.3 or so
SALT = 0xC4  # keeps generation's spans apart from evaluation's


@dataclass(frozen=True)
class Document:
    """One document's number, its first words and the words that really follow."""

    index: int
    prefix: str
    reference: str


def cut_words(text: str, count: int) -> str | None:
    """`text` up to the end of its word number `count`, None if it has fewer."""
    end = None
    for number, word in enumerate(WORD.finditer(text), start=1):
        if number == count:
            end = word.end()
            break
    return text[:end] if end is not None else None


def split_document(index: int, text: str, prefix_words: int, continuation_words: int) -> Document | None:
    """A text as prefix and reference, cut between words; None if it has too few words."""
    whole, prefix = cut_words(text, prefix_words + continuation_words), cut_words(text, prefix_words)
    if whole is None or prefix is None:
        return None
    return Document(index, prefix, whole[len(prefix) :])


def pick(texts: Iterable[str], count: int, prefix_words: int, continuation_words: int) -> list[Document]:
    """The first `count` texts that are long enough, as documents; UsageError if there is none."""
    documents = []
    for text in texts:
        document = split_document(len(documents), text, prefix_words, continuation_words)
        if document is not None:
            documents.append(document)
        if len(documents) == count:
            break
    if not documents:
        raise UsageError(
            f"no document has the {prefix_words + continuation_words} words of a prefix and a continuation"
        )
    return documents


def documents_digest(documents: Iterable[Document]) -> str:
    """SHA-256 over the documents' texts, in order."""
    return hashlib.sha256("\0".join(d.prefix + "\0" + d.reference for d in documents).encode()).hexdigest()


def as_batch(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows of token ids as a batch `(rows, longest)` padded on the right, and its attention mask if any is padded."""
    input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    real = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)], real[number, : len(row)] = torch.tensor(row), 1
    return input_ids.to(device), None if bool(real.all()) else real.to(device)


@torch.no_grad()
def prefill(
    model: nn.Module, input_ids: Tensor, cache: SentinelCache, attention_mask: Tensor | None = None, chunk: int = 128
) -> Tensor:
    """Read prefixes `(batch, length)`, padded on the right, into the cache in chunks.

    Returns the logits behind every row's last token, `(batch, vocabulary)`. Peak memory follows what the cache keeps
    and the chunk, not the length. (This project.)
    """
    batch, length = input_ids.shape
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    last = (real * torch.arange(length, device=real.device)).argmax(-1)
    found = [None] * batch
    for start in range(0, length, chunk):
        within = range(start, start + chunk)
        ending = {row: position - start for row, position in enumerate(last.tolist()) if position in within}
        wanted = sorted(set(ending.values())) or [0]  # scores of the whole vocabulary cost as much as a layer or more
        logits = model(
            input_ids=input_ids[:, start : start + chunk],
            attention_mask=None if attention_mask is None else real[:, start : start + chunk],
            past_key_values=cache,
            logits_to_keep=torch.tensor(wanted),
        ).logits
        for row, position in ending.items():
            found[row] = logits[row, wanted.index(position)]
    return torch.stack(found)


@dataclass(frozen=True)
class Sampler:
    """How documents are continued: `words` words, `continuations` times each, by nucleus sampling with `top_p`."""

    words: int = 64
    continuations: int = 8
    top_p: float = 0.9
    seed: int = 0
    allow_eos: bool = False
    compress_generated: bool = False
    chunk: int = 128


Informant = Callable[[list[int]], np.ndarray]  # from token ids to their self-information


def prefix_ids(
    document: Document,
    tokenizer,
    rule: Rule,
    plan: SpanPlan,
    protocol: str,
    unit: str = "token",
    spacy_model: str | None = None,
    inform: Informant | None = None,
) -> list[int]:
    """The prefix as token ids, its spans between sentinels where the method compresses.

    Under `matched` spans are drawn as `plan` says, under `paper` the published sampler works on words. A sampler by
    self-information asks `inform`, and takes whole units (by `spacy_model`).
    """
    if CL_TOKEN in document.prefix or CR_TOKEN in document.prefix:
        raise UsageError(f"document {document.index} holds {CL_TOKEN} or {CR_TOKEN}, which are reserved")
    rng = np.random.default_rng([plan.seed, SALT, document.index])
    if rule.uses_sentinels and protocol == "paper":
        return unended(tokenizer, mark_words(document.prefix, plan, rng))
    tokens = unended(tokenizer, document.prefix)
    if not rule.uses_sentinels:
        return tokens
    information = starts = None
    if plan.sampler == "self_information":
        information = inform(tokens)
        if unit != "token":
            offsets = tokenizer(document.prefix, return_offsets_mapping=True)["offset_mapping"]
            starts = unit_starts([document.prefix], [offsets[: len(tokens)]], unit, spacy_model)[0]
    try:
        spans = plan.spans(len(tokens), rng, information, starts)
    except ValueError as error:
        raise UsageError(f"document {document.index}: {error}") from error
    return insert_sentinels(tokens, spans, rule.cl_id, rule.cr_id, rule.cr_tokens)


@torch.no_grad()
def continue_documents(
    model: nn.Module,
    tokenizer,
    documents: Sequence[Document],
    rows: Sequence[list[int]],
    rule: Rule,
    plan: SpanPlan,
    sampler: Sampler,
) -> Iterator[dict]:
    """Continue a batch of documents with a patched model, `rows` being their `prefix_ids`; one record a document.

    A record holds `index`, `prefix`, `reference`, `continuations` (texts; `short_continuations` counts those that were
    given up with fewer words), `prefix_tokens`, the `cache_length` (keys) and `cache_bytes` that are held of the
    prefix, `new_tokens` and `seconds` (the batch's, shared evenly).
    """
    start = time.perf_counter()
    device = input_device(model)
    cache = SentinelCache(rule=rule)
    input_ids, padding = as_batch(rows, device)
    logits = prefill(model, input_ids, cache, padding, sampler.chunk)
    lengths, slot_bytes = cache.lengths.tolist(), cache.bytes / (len(rows) * cache.slots)

    cache.batch_repeat_interleave(sampler.continuations)
    logits = logits.repeat_interleave(sampler.continuations, dim=0)
    tokens = _sample(model, tokenizer, cache, logits, documents, rule, plan, sampler)
    texts = [_cut(tokenizer, row, sampler) for row in tokens]
    seconds = (time.perf_counter() - start) / len(rows)
    for number, (document, row) in enumerate(zip(documents, rows)):
        own = slice(number * sampler.continuations, (number + 1) * sampler.continuations)
        yield {
            "index": document.index,
            "prefix": document.prefix,
            "reference": document.reference,
            "continuations": texts[own],
            "prefix_tokens": int(rule.text(torch.tensor([row])).sum()),
            "cache_length": lengths[number],
            "cache_bytes": round(lengths[number] * slot_bytes),
            "short_continuations": sum(cut_words(text, sampler.words) is None for text in texts[own]),
            "new_tokens": sum(map(len, tokens[own])),
            "seconds": seconds,
        }


def _sample(model, tokenizer, cache, logits, documents, rule, plan, sampler) -> list[list[int]]:
    """New tokens of every row (documents · continuations). A row that has its words leaves the batch and the cache."""
    warp = TopPLogitsWarper(sampler.top_p)
    generators = [torch.Generator().manual_seed(sampler.seed * 1_000_003 + document.index) for document in documents]
    never = forbidden(tokenizer, model, logits.shape[-1], sampler.allow_eos)
    budget = None
    if sampler.compress_generated and rule.uses_sentinels and plan.ratio > 0:
        budget = Budget(ratio=plan.ratio, span_length=plan.max_span_length)
    rows: list[list[int]] = [[] for _ in range(len(logits))]
    active = list(range(len(rows)))
    for step in range(1, sampler.words * TOKENS_PER_WORD + 1):
        logits[:, never] = -torch.inf
        weights = warp(None, logits.float()).softmax(-1).cpu()
        for row, token in zip(active, _draw(weights, active, generators, sampler.continuations)):
            rows[row].append(token)
        if step % CHECK_EVERY == 0:
            left = [number for number, row in enumerate(active) if not _has_words(tokenizer, rows[row], sampler)]
            if not left:
                break
            if len(left) < len(active):
                active = [active[number] for number in left]
                cache.batch_select_indices(torch.tensor(left))
        newest = torch.tensor([[rows[row][-1]] for row in active], device=input_device(model))
        logits = model(input_ids=newest, past_key_values=cache).logits[:, -1]
        if budget is not None:
            budget.enforce(cache)
    return rows


def forbidden(tokenizer, model: nn.Module, vocabulary: int, allow_eos: bool) -> list[int]:
    """Token ids that are no text: special tokens, end-of-text among them unless allowed, and rows without a token."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    never = special | set(tokenizer.all_special_ids) | set(range(len(tokenizer), vocabulary)) | ends
    return sorted(never - ({tokenizer.eos_token_id} if allow_eos else set()))


def _draw(weights: Tensor, active: list[int], generators: list[torch.Generator], continuations: int) -> list[int]:
    """A token for every active row, drawn with its document's generator."""
    drawn = []
    for document, members in itertools.groupby(range(len(active)), key=lambda number: active[number] // continuations):
        drawn += torch.multinomial(weights[list(members)], 1, generator=generators[document]).flatten().tolist()
    return drawn


def _has_words(tokenizer, tokens: list[int], sampler: Sampler) -> bool:
    """Whether a row has begun a word behind the last wanted one, which is complete then, or has ended."""
    if sampler.allow_eos and tokenizer.eos_token_id in tokens:
        return True
    return cut_words(tokenizer.decode(tokens, skip_special_tokens=True), sampler.words + 1) is not None


def _cut(tokenizer, tokens: list[int], sampler: Sampler) -> str:
    """A row as text, up to end-of-text or its last wanted word."""
    if sampler.allow_eos and tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return cut_words(text, sampler.words) or text
