import math

import numpy as np
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from kv_compression.generation import sampling
from kv_compression.io.errors import UsageError
from kv_compression.methods import METHODS
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.local_attention import LocalAttention
from kv_compression.methods.rule import Rule
from kv_compression.model.attention import compressed_attention
from kv_compression.model.cache import SentinelCache
from kv_compression.model.vocabulary import add_sentinels, unended
from kv_compression.spans.plan import SpanPlan
from tests import slow_rules
from tests.conftest import sentences


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """An untrained model takes many tokens to hit on a word."""
    monkeypatch.setattr(sampling, "TOKENS_PER_WORD", 100)


def words(text: str) -> list[str]:
    return sampling.WORD.findall(text)


def test_words_are_runs_of_letters_digits_and_what_stands_inside_them():
    text = "Don't pay £3.50 (or 1,000) for rock'n'roll... it’s e.g. naïve_x 'quoted' 7."
    expected = ["Don't", "pay", "3.50", "or", "1", "000", "for", "rock'n'roll", "it’s", "e", "g", "naïve", "x"]
    assert words(text) == [*expected, "quoted", "7"]


def test_documents_are_cut_between_words():
    text = "One two, three! four (five) six."
    document = sampling.split_document(7, text, 3, 2)
    assert (document.index, document.prefix, document.reference) == (7, "One two, three", "! four (five")
    assert sampling.split_document(0, text, 3, 4) is None
    picked = sampling.pick(["too short", text, text, text], 2, 3, 2)
    assert [document.index for document in picked] == [0, 1]
    with pytest.raises(UsageError, match="no document has the 9 words"):
        sampling.pick([text], 2, 3, 6)


@pytest.fixture(scope="module")
def loaded(tiny_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).double().eval()
    return tokenizer, model, add_sentinels(tokenizer, model)


@pytest.mark.parametrize("template", ["$A <|endoftext|>", "<|endoftext|> $A <|endoftext|>", "<|endoftext|> $A"])
@pytest.mark.parametrize("protocol", ["matched", "paper"])
def test_what_is_to_be_continued_does_not_end_in_end_of_text(tiny_model, template, protocol):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    text = sampling.pick(sentences(1, seed=5), 1, 36, 2)[0].prefix
    tokenizer.add_tokens(["<CL>", "<CR>"], special_tokens=True)
    cl, cr = tokenizer.convert_tokens_to_ids(["<CL>", "<CR>"])
    plain = tokenizer(text)["input_ids"]
    end = tokenizer.eos_token_id
    special_tokens = [("<|endoftext|>", end)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special_tokens)
    assert tokenizer(text)["input_ids"] != plain
    before = [end] * template.startswith("<")
    assert unended(tokenizer, text) == before + plain
    assert unended(tokenizer, text + "<|endoftext|>") == [*before, *plain, end]  # the text's own
    document = sampling.Document(0, text, " a")
    rule, plan = KVCompression(cl, cr, 0.5), SpanPlan(True, 0.5, 10, 0)
    ids = sampling.prefix_ids(document, tokenizer, rule, plan, protocol)
    assert {cl, cr} <= {*ids} and ids[-1] != end and ids.count(end) == len(before)
    assert protocol == "paper" or [number for number in ids if number not in (cl, cr)] == before + plain
    assert sampling.prefix_ids(document, tokenizer, Rule(), plan, protocol) == before + plain


def rule_of(loaded, method="kv_compression", ratio=0.5) -> Rule:
    return METHODS[method](*loaded[2], ratio, 0)


DOCUMENTS = sampling.pick(sentences(3, seed=5), 3, 20, 10)
SAMPLER = sampling.Sampler(words=6, continuations=2, chunk=16)


def generate(loaded, documents=DOCUMENTS, rule=None, sampler=SAMPLER, protocol="matched", ratio=0.5, plan=None):
    tokenizer, model, _ = loaded
    rule = rule or rule_of(loaded, ratio=ratio)
    plan = plan or SpanPlan(rule.uses_sentinels, ratio, 10, 0)
    with compressed_attention(model, rule=rule):
        rows = [sampling.prefix_ids(document, tokenizer, rule, plan, protocol) for document in documents]
        return list(sampling.continue_documents(model, tokenizer, documents, rows, rule, plan, sampler))


@pytest.mark.parametrize("method", METHODS)
def test_records_hold_continuations_of_the_wanted_words(loaded, method):
    found = generate(loaded, rule=rule_of(loaded, method))
    assert [record["index"] for record in found] == [0, 1, 2]
    for record, document in zip(found, DOCUMENTS):
        assert (record["prefix"], record["reference"]) == (document.prefix, document.reference)
        assert len(record["continuations"]) == 2
        assert all(len(words(text)) == 6 for text in record["continuations"])
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
    rows = [sampling.prefix_ids(document, tokenizer, rule, plan, "matched") for document in DOCUMENTS]
    ids = torch.zeros(3, max(map(len, rows)), dtype=torch.long)
    real = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)], real[number, : len(row)] = torch.tensor(row), 1
    with compressed_attention(model, rule=rule), torch.no_grad():
        logits = sampling.prefill(model, ids, SentinelCache(rule=rule), real, chunk=7)
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
            assert all(len(words(text)) == 6 for text in record["continuations"])
        chunked = sampling.Sampler(words=6, continuations=2, chunk=5, compress_generated=compress_generated)
        again = generate(loaded, rule=rule, sampler=chunked, plan=plan)
        assert [record["continuations"] for record in again] == [record["continuations"] for record in found]


def test_prefixes_are_compressed_where_they_inform_least(loaded):
    tokenizer, _, (cl, cr) = loaded
    document, rule = DOCUMENTS[0], rule_of(loaded)
    tokens = tokenizer(document.prefix)["input_ids"]
    plan = SpanPlan(True, 0.4, 10, 0, "self_information")
    ids = sampling.prefix_ids(document, tokenizer, rule, plan, "matched", inform=lambda t: np.arange(len(t))[::-1])
    assert ids[: ids.index(cl)] == tokens[: ids.index(cl)]
    assert ids.index(cl) > len(tokens) // 3  # what comes last was said to inform least
    assert slow_rules.removed(ids, cl, cr) == round(0.4 * len(tokens))


def test_paper_protocol_marks_words_of_the_prefix(loaded):
    tokenizer, _, (cl, _) = loaded
    document = sampling.pick(sentences(1, seed=5), 1, 36, 2)[0]
    ids = sampling.prefix_ids(document, tokenizer, rule_of(loaded), SpanPlan(True, 0.5, 10, 0), "paper")
    space = tokenizer(" ")["input_ids"][0]
    before = [ids[number - 1] for number in range(1, len(ids)) if ids[number] == cl]
    assert before
    assert set(before) == {space}


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
    assert all(len(words(text)) == 6 for record in never for text in record["continuations"])
    assert any(len(words(text)) < 6 for record in allowed for text in record["continuations"])
