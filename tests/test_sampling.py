"""Sampling on a compressed cache."""

import math

import pytest
import torch
import transformers

from kv_compression.api import attach
from kv_compression.generation import sampling
from kv_compression.generation.documents import pick_documents, prefix_ids
from kv_compression.generation.words import WORD
from kv_compression.methods import METHODS
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.local_attention import LocalAttention
from kv_compression.methods.rule import Rule
from kv_compression.model.cache import SentinelCache
from kv_compression.model.reading import as_batch, prefill
from kv_compression.model.vocabulary import add_sentinels
from kv_compression.spans.plan import SpanPlan
from tests import slow_rules
from tests.conftest import sentences


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """An untrained model takes many tokens to hit on a word."""
    monkeypatch.setattr(sampling, "TOKENS_PER_WORD", 100)


@pytest.fixture(scope="module")
def loaded(tiny_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, max_position_embeddings=4096).double().eval()
    return tokenizer, model, add_sentinels(tokenizer, model)


def rule_of(loaded, method="kv_compression", ratio=0.5) -> Rule:
    return METHODS[method](*loaded[2], ratio, 0)


DOCUMENTS = pick_documents(sentences(3, seed=5), 3, 20, 10)
SAMPLER = sampling.Sampler(words=6, continuations=2, chunk=16)


def generate(loaded, documents=DOCUMENTS, rule=None, sampler=SAMPLER, protocol="matched", ratio=0.5, plan=None):
    tokenizer, model, _ = loaded
    rule = rule or rule_of(loaded, ratio=ratio)
    plan = plan or SpanPlan(rule.uses_sentinels, ratio, 10, 0)
    with attach(model, rule=rule):
        rows = [prefix_ids(document, tokenizer, rule, plan, protocol) for document in documents]
        return list(sampling.continue_documents(model, tokenizer, documents, rows, rule, plan, sampler))


@pytest.mark.parametrize("method", METHODS)
def test_records_hold_continuations_of_the_wanted_words(loaded, method):
    found = generate(loaded, rule=rule_of(loaded, method))
    assert [record["index"] for record in found] == [0, 1, 2]
    for record, document in zip(found, DOCUMENTS):
        assert (record["prefix"], record["reference"]) == (document.prefix, document.reference)
        assert len(record["continuations"]) == 2
        assert all(len(WORD.findall(text)) == 6 for text in record["continuations"])
        assert not any("<CL>" in text or "endoftext" in text for text in record["continuations"])
        tokens = len(loaded[0](document.prefix)["input_ids"])
        assert record["prefix_tokens"] == tokens
        kept = {
            "full_attention": tokens,
            "kv_compression": tokens - round(tokens / 2),
            "local_attention": tokens - int(tokens / 2),
            "sink_attention": math.ceil((tokens + 1) / 2) - 1,
        }
        if method in kept:
            assert record["cache_length"] == kept[method]
        assert record["cache_bytes"] == record["cache_length"] * 2 * 2 * 32 * 8  # layers · keys, values · width · fp64


def test_a_sample_depends_on_seed_and_document_alone(loaded):
    texts = [record["continuations"] for record in generate(loaded)]
    assert [record["continuations"] for record in generate(loaded)] == texts
    alone = generate(loaded, DOCUMENTS[1:2])
    assert alone[0]["continuations"] == texts[1]
    other = sampling.Sampler(words=6, continuations=2, chunk=16, seed=1)
    assert [record["continuations"] for record in generate(loaded, sampler=other)] != texts
    assert texts[0][0] != texts[0][1]


def test_chunks_do_not_show_in_what_is_generated(loaded):
    texts = [record["continuations"] for record in generate(loaded)]
    for chunk in (3, 500):
        sampler = sampling.Sampler(words=6, continuations=2, chunk=chunk)
        assert [record["continuations"] for record in generate(loaded, sampler=sampler)] == texts


def test_sampling_follows_the_masked_model(loaded):
    """The first sampled token's distribution is the masked forward pass's, at every row's own length."""
    tokenizer, model, (cl, cr) = loaded
    rule = KVCompression(cl, cr, 0.5, 0)
    plan = SpanPlan(True, 0.5, 10, 0)
    rows = [prefix_ids(document, tokenizer, rule, plan, "matched") for document in DOCUMENTS]
    ids, real = as_batch(rows, model.device)
    with attach(model, rule=rule), torch.no_grad():
        logits = prefill(model, ids, SentinelCache(rule=rule), real, chunk=7)
        for number, row in enumerate(rows):
            expected = model(torch.tensor([row]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits[number], expected)
            text = len(tokenizer(DOCUMENTS[number].prefix)["input_ids"])
            assert slow_rules.removed(row, cl, cr) == round(text / 2)


def test_options_of_kv_compression_work_while_text_is_generated(loaded):
    """Sinks and a recent window stay, everything else keeps the exact ratio, and generated text is folded too."""
    tokenizer, _, (cl, cr) = loaded
    rule = KVCompression(cl, cr, 0.3, sink_tokens=4, cr_tokens=2, cr_visibility="context", recent_tokens=3)
    plan = SpanPlan(True, 0.3, 10, 0, "fixed", sink_tokens=4, recent_tokens=3, cr_tokens=2)
    for compress_generated in (False, True):
        sampler = sampling.Sampler(words=6, continuations=2, chunk=16, compress_generated=compress_generated)
        found = generate(loaded, rule=rule, sampler=sampler, plan=plan)
        for record in found:
            tokens = record["prefix_tokens"]
            assert record["cache_length"] == tokens - round(0.3 * tokens)
            assert all(len(WORD.findall(text)) == 6 for text in record["continuations"])
        chunked = sampling.Sampler(words=6, continuations=2, chunk=5, compress_generated=compress_generated)
        again = generate(loaded, rule=rule, sampler=chunked, plan=plan)
        assert [record["continuations"] for record in again] == [record["continuations"] for record in found]


def test_generated_text_is_compressed_on_request(loaded, monkeypatch):
    caches = []

    class Recorded(SentinelCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            caches.append(self)

    monkeypatch.setattr(sampling, "SentinelCache", Recorded)
    for compress in (False, True):
        generate(loaded, sampler=sampling.Sampler(40, 2, chunk=16, compress_generated=compress))
    lengths = [cache.length / cache.logical_length for cache in caches]
    assert lengths[1] < 0.6 < lengths[0]


def test_end_of_text_ends_a_continuation_only_if_it_may(loaded):
    tokenizer, model, _ = loaded
    eos = tokenizer.eos_token_id
    bias = torch.zeros(model.get_output_embeddings().weight.shape[0], dtype=torch.float64)
    bias[eos] = 8.0  # nearly certain wherever it is allowed
    handle = model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output + bias)
    try:
        never = generate(loaded, rule=LocalAttention(ratio=0.5))
        allowed = generate(
            loaded, rule=LocalAttention(ratio=0.5), sampler=sampling.Sampler(6, 4, chunk=16, allow_eos=True)
        )
    finally:
        handle.remove()
    assert all(len(WORD.findall(text)) == 6 for record in never for text in record["continuations"])
    assert any(len(WORD.findall(text)) < 6 for record in allowed for text in record["continuations"])
