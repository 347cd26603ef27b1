"""Documents: where they are cut, and what their prefixes are as token ids."""

import numpy as np
import pytest
import transformers
from tokenizers.processors import TemplateProcessing

from kv_compression.generation.documents import Document, pick_documents, prefix_ids, split_document
from kv_compression.generation.words import WORD
from kv_compression.io.errors import UsageError
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.rule import Rule
from kv_compression.model.vocabulary import add_sentinels, unended
from kv_compression.spans.plan import SpanPlan
from tests import slow_rules
from tests.conftest import sentences


@pytest.fixture(scope="module")
def marking(tiny_model):
    """A tokenizer with sentinels, and KV compression at half."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    return tokenizer, KVCompression(*add_sentinels(tokenizer), 0.5)


def test_words_are_runs_of_letters_digits_and_what_stands_inside_them():
    text = "Don't pay £3.50 (or 1,000) for rock'n'roll... it’s e.g. naïve_x 'quoted' 7."
    expected = ["Don't", "pay", "3.50", "or", "1", "000", "for", "rock'n'roll", "it’s", "e", "g", "naïve", "x"]
    assert WORD.findall(text) == [*expected, "quoted", "7"]


def test_documents_are_cut_between_words():
    text = "One two, three! four (five) six."
    document = split_document(7, text, 3, 2)
    assert (document.index, document.prefix, document.reference) == (7, "One two, three", "! four (five")
    assert split_document(0, text, 3, 4) is None
    picked = pick_documents(["too short", text, text, text], 2, 3, 2)
    assert [document.index for document in picked] == [0, 1]
    with pytest.raises(UsageError, match="no document has the 9 words"):
        pick_documents([text], 2, 3, 6)


@pytest.mark.parametrize("template", ["$A <|endoftext|>", "<|endoftext|> $A <|endoftext|>", "<|endoftext|> $A"])
@pytest.mark.parametrize("protocol", ["matched", "paper"])
def test_what_is_to_be_continued_does_not_end_in_end_of_text(tiny_model, template, protocol):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    text = pick_documents(sentences(1, seed=5), 1, 36, 2)[0].prefix
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
    document = Document(0, text, " a")
    rule, plan = KVCompression(cl, cr, 0.5), SpanPlan(True, 0.5, 10, 0)
    ids = prefix_ids(document, tokenizer, rule, plan, protocol)
    assert {cl, cr} <= {*ids} and ids[-1] != end and ids.count(end) == len(before)
    assert protocol == "paper" or [number for number in ids if number not in (cl, cr)] == before + plain
    assert prefix_ids(document, tokenizer, Rule(), plan, protocol) == before + plain


def test_prefixes_are_compressed_where_they_inform_least(marking):
    tokenizer, rule = marking
    cl, cr = rule.cl_id, rule.cr_id
    (document,) = pick_documents(sentences(1, seed=5), 1, 20, 10)
    tokens = tokenizer(document.prefix)["input_ids"]
    plan = SpanPlan(True, 0.4, 10, 0, "self_information")
    ids = prefix_ids(document, tokenizer, rule, plan, "matched", inform=lambda t: np.arange(len(t))[::-1])
    assert ids[: ids.index(cl)] == tokens[: ids.index(cl)]
    assert ids.index(cl) > len(tokens) // 3  # what comes last was said to inform least
    assert slow_rules.removed(ids, cl, cr) == round(0.4 * len(tokens))


def test_paper_protocol_marks_words_of_the_prefix(marking):
    tokenizer, rule = marking
    (document,) = pick_documents(sentences(1, seed=5), 1, 36, 2)
    ids = prefix_ids(document, tokenizer, rule, SpanPlan(True, 0.5, 10, 0), "paper")
    space = tokenizer(" ")["input_ids"][0]
    before = [ids[number - 1] for number in range(1, len(ids)) if ids[number] == rule.cl_id]
    assert before
    assert set(before) == {space}
