"""Documents: which texts are continued, where they are cut, and a prefix as token ids with its spans marked."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from kv_compression.data import embedded, reading
from kv_compression.data.blocks import mark_words
from kv_compression.generation.words import WORD
from kv_compression.io.errors import UsageError
from kv_compression.methods.rule import Rule
from kv_compression.methods.sentinels import insert_sentinels
from kv_compression.model.vocabulary import CL_TOKEN, CR_TOKEN, unended
from kv_compression.spans.plan import SpanPlan
from kv_compression.spans.self_information import unit_starts

SALT = 0xC4  # keeps generation's spans apart from evaluation's

Informant = Callable[[list[int]], np.ndarray]  # from token ids to their self-information


@dataclass(frozen=True)
class Document:
    """One document's number, its first words and the words that really follow."""

    index: int
    prefix: str
    reference: str


def cut_words(text: str, count: int) -> str | None:
    """`text` up to the end of its word number `count`, None if it has fewer."""
    for number, word in enumerate(WORD.finditer(text), start=1):
        if number == count:
            return text[: word.end()]
    return None


def split_document(index: int, text: str, prefix_words: int, continuation_words: int) -> Document | None:
    """A text as prefix and reference, cut between words; None if it has too few words."""
    whole, prefix = cut_words(text, prefix_words + continuation_words), cut_words(text, prefix_words)
    if whole is None or prefix is None:
        return None
    return Document(index, prefix, whole[len(prefix) :])


def pick_documents(texts: Iterable[str], count: int, prefix_words: int, continuation_words: int) -> list[Document]:
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


def find_texts(docs_file: str | None, preset: str, seed: int) -> Iterable[str]:
    """The texts to continue: a local file's, the embedded preset's test text, or C4's in the order of `seed`."""
    if docs_file:
        return reading.read_texts(docs_file, "docs_file")
    if preset == "embedded":
        return embedded.embedded_text()["test"]["text"]
    return reading.stream_c4(seed)


def documents_digest(documents: Iterable[Document]) -> str:
    """SHA-256 over the documents' texts, in order."""
    return hashlib.sha256("\0".join(d.prefix + "\0" + d.reference for d in documents).encode()).hexdigest()


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
    """The prefix as token ids, its spans between sentinels if the method has them.

    Under `matched` spans are drawn as `plan` says; under `paper` the published sampler works on words. The sampler by
    self-information asks `inform`, and takes whole units of the kind `unit` (found by `spacy_model`). UsageError if
    the text holds sentinels or is too short for the ratio.
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
