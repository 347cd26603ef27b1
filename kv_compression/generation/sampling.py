"""Nucleus sampling on a compressed cache.

A prefix is read once, in chunks, and its continuations share what the cache kept of it. What is sampled for a document
depends on the seed and the document's number alone, so an interrupted run resumes as if it had never stopped.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import TopPLogitsWarper

from kv_compression.generation.documents import Document, cut_words
from kv_compression.methods.rule import Rule
from kv_compression.model.architectures import input_device
from kv_compression.model.budget import Budget
from kv_compression.model.cache import SentinelCache
from kv_compression.model.reading import as_batch, prefill
from kv_compression.spans.plan import SpanPlan

CHECK_EVERY = 8  # steps between checks whether all continuations have their words
TOKENS_PER_WORD = 4  # sampling stops after this many tokens per wanted word: ordinary text takes about 1.3


@dataclass(frozen=True)
class Sampler:
    """How documents are continued: `continuations` times each, for `words` words, by nucleus sampling with `top_p`.

    With `allow_eos` a continuation may end earlier; with `compress_generated` the text that is generated is compressed
    too. Prefixes are read `chunk` tokens at a time.
    """

    words: int = 64
    continuations: int = 8
    top_p: float = 0.9
    seed: int = 0
    allow_eos: bool = False
    compress_generated: bool = False
    chunk: int = 128


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
    """One record per document of a batch that a patched model continues; `rows` are the documents' `prefix_ids`.

    A record holds `index`, `prefix`, `reference`, `continuations` (texts; `short_continuations` counts those with too
    few words), `prefix_tokens`, the `cache_length` (keys) and `cache_bytes` that the prefix takes after it is read,
    `new_tokens` and `seconds` (an even share of the batch's).
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
        rows_of_document = slice(number * sampler.continuations, (number + 1) * sampler.continuations)
        yield {
            "index": document.index,
            "prefix": document.prefix,
            "reference": document.reference,
            "continuations": texts[rows_of_document],
            "prefix_tokens": int(rule.text(torch.tensor([row])).sum()),
            "cache_length": lengths[number],
            "cache_bytes": round(lengths[number] * slot_bytes),
            "short_continuations": sum(cut_words(text, sampler.words) is None for text in texts[rows_of_document]),
            "new_tokens": sum(map(len, tokens[rows_of_document])),
            "seconds": seconds,
        }


def _sample(model, tokenizer, cache, logits, documents, rule, plan, sampler) -> list[list[int]]:
    """The new tokens of every row (documents · continuations). Rows that have all their words leave the batch and the
    cache."""
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
    """Token ids that are not text: special tokens (end-of-text too, unless allowed) and ids without a token."""
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
    """Whether a row has ended, or has begun the word after the last wanted one, which is then complete."""
    if sampler.allow_eos and tokenizer.eos_token_id in tokens:
        return True
    return cut_words(tokenizer.decode(tokens, skip_special_tokens=True), sampler.words + 1) is not None


def _cut(tokenizer, tokens: list[int], sampler: Sampler) -> str:
    """A row as text, up to end-of-text or the last wanted word."""
    if sampler.allow_eos and tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return cut_words(text, sampler.words) or text
