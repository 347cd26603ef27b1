"""How well questions about a document are answered from the cache that holds it, in nats and in exact answers.

The document is read into the real cache, compressed as it is in use, and the question follows. Three things are
compared: the method, full attention by the same weights ("full"), and the method where the document says something else
in place of what had left ("none").
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kv_compression.methods.full_attention import FullAttention
from kv_compression.methods.rule import Rule
from kv_compression.model.attention import Patch
from kv_compression.model.cache import SentinelCache
from kv_compression.model.reading import as_batch, prefill
from kv_compression.recall.tasks import Question

CHUNK = 512


class Answers(NamedTuple):
    """What came of a batch of questions, a value for each: the `nats` of every token of the right answer, and whether
    greedy decoding gives it (`exact`). `kept` are the keys held of each document."""

    nats: list[list[float]]
    exact: list[bool]
    kept: list[int]


def from_cache(model: nn.Module, rule: Rule, documents: Sequence[list[int]], questions: Sequence[Question]) -> Answers:
    """Read documents (token ids, marked as the rule needs) into a cache, and one question about each after it."""
    with Patch(model, rule), torch.no_grad():
        cache = fill(model, rule, documents)
        return after(model, cache, questions)


def fill(model: nn.Module, rule: Rule, documents: Sequence[list[int]]) -> SentinelCache:
    """A cache that has read the documents, of a patched model."""
    cache = SentinelCache(rule=rule)
    input_ids, padding = as_batch(documents, model.device)
    prefill(model, input_ids, cache, padding, CHUNK)
    return cache


def after(model: nn.Module, cache: SentinelCache, questions: Sequence[Question]) -> Answers:
    """Ask one question of each row of a cache, which stays as it was; one row may be asked several."""
    kept = cache.lengths.tolist()
    input_ids, padding = as_batch([question.ids + question.answer for question in questions], model.device)
    inputs = cache.followed_by(input_ids, padding)
    inputs.pop("suppress_tokens", None)
    longest = max(len(question.answer) for question in questions)
    logits = model(**inputs, logits_to_keep=longest + 1).logits  # padding is on the left: answers end with the row
    return _judge(logits, questions, kept)


def in_one_pass(model: nn.Module, rule: Rule, documents: Sequence[list[int]], questions: Sequence[Question]) -> Answers:
    """As `from_cache`, by the rule's mask in one pass and without a cache."""
    rows = [document + question.ids + question.answer for document, question in zip(documents, questions)]
    input_ids, padding = as_batch(rows, model.device)
    nats, exact = [], []
    with Patch(model, rule), torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=padding, use_cache=False).logits
    for row, ids, question in zip(logits, rows, questions):
        one = _judge(row[None, : len(ids)], [question], [0])
        nats, exact = nats + one.nats, exact + one.exact
    return Answers(nats, exact, [len(document) for document in documents])


def in_full(model: nn.Module, documents: Sequence[list[int]], questions: Sequence[Question]) -> Answers:
    """The same questions under full attention, of documents without sentinels."""
    return in_one_pass(model, FullAttention(), documents, questions)


def have_left(rule: Rule, document: list[int], question: Question) -> list[bool]:
    """Which tokens that answer the question are no longer seen in their original form when the answer begins.

    `document` is marked; `question.needed` counts text tokens.
    """
    ids = torch.tensor([document + question.ids])
    return (~rule.mask(ids)[0, -1, _needed_places(rule, document, question)]).tolist()


def without(rule: Rule, document: list[int], question: Question, gone: list[bool]) -> list[int]:
    """The marked document with something else in place of those tokens of the answer that had left."""
    changed = list(document)
    for place, other, left in zip(_needed_places(rule, document, question).tolist(), question.other, gone):
        changed[place] = other if left else changed[place]
    return changed


def _needed_places(rule: Rule, document: list[int], question: Question) -> Tensor:
    """Where in a marked document the tokens stand that answer the question, long."""
    first, last = question.needed
    return rule.text(torch.tensor([document]))[0].nonzero().flatten()[first : last + 1]


def _judge(logits: Tensor, questions: Sequence[Question], kept: list[int]) -> Answers:
    """Answers from logits `(batch, length, vocabulary)` whose last position is that of the answer's last token."""
    nats, exact = [], []
    for scores, question in zip(logits, questions):
        count = len(question.answer)
        scores = scores[-count - 1 : -1].float()
        answer = torch.tensor(question.answer, device=scores.device)
        nats.append(nn.functional.cross_entropy(scores, answer, reduction="none").tolist())
        exact.append(bool((scores.argmax(-1) == answer).all()))
    return Answers(nats, exact, kept)


class Together(NamedTuple):
    """All questions about one document asked of one cache, against reading the document again for each."""

    nats: list[list[float]]
    alone: list[list[float]]
    seconds: float
    seconds_alone: float
    bytes: int
    bytes_full: int


def together(
    model: nn.Module, rule: Rule, document: list[int], plain: list[int], questions: list[Question]
) -> Together:
    """Compress a document once and ask everything; then read it anew for each question. `plain` has no sentinels."""
    with torch.no_grad():
        with Patch(model, rule):
            start = time.perf_counter()
            cache = fill(model, rule, [document])
            nats = [after(model, cache, [question]).nats[0] for question in questions]
            once = time.perf_counter() - start
            start = time.perf_counter()
            alone = [after(model, fill(model, rule, [document]), [question]).nats[0] for question in questions]
            again = time.perf_counter() - start
        with Patch(model, FullAttention()):
            whole = fill(model, FullAttention(), [plain]).bytes
    return Together(nats, alone, once, again, cache.bytes, whole)
