"""How transformers' `generate` continues a cache: what works gives what no cache gives, what cannot is refused."""

import copy

import peft
import pytest
import torch
import transformers

import kv_compression as kvc
from kv_compression import api
from kv_compression.methods.sink_attention import SinkAttention
from kv_compression.model.cache import SentinelCache
from tests.conftest import sentences
from tests.models import random_model

TEXTS = sentences(2, seed=9)
SETTINGS = {"max_new_tokens": 8, "min_new_tokens": 8}
QUESTION = " the cat sees"
OPTIONS = {"plain": {}, "window": {"recent_tokens": 4}, "sinks": {"sink_tokens": 2, "cr_tokens": 2}}


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(params=OPTIONS)
def attached(request, tokenizer):
    """A model that is sure of its tokens, attached: `(model, rule)`."""
    config = transformers.LlamaConfig.from_dict(
        random_model("llama").config.to_dict() | {"vocab_size": 330, "max_position_embeddings": 256}
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with kvc.attach(model, tokenizer, **OPTIONS[request.param]) as patch:
        yield model, patch.rule


def tokens_of(tokenizer, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt")["input_ids"]


def marked(tokenizer, rule, text: str) -> list[int]:
    return api.mark(tokenizer(text)["input_ids"], rule, 0.5, api.SpanLengths(), 0)


def without_a_cache(model, rule, ids: list[int], **how) -> torch.Tensor:
    """What `generate` adds to these tokens when every step reads all of them under the mask."""
    out = model.generate(torch.tensor([ids]), use_cache=False, suppress_tokens=[rule.cl_id, rule.cr_id], **how)
    return out[:, len(ids) :]


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 2}]
    + [{"prefill_chunk_size": 2}],
    ids=["greedy", "beams", "sequences", "lookup", "chunks"],
)
def test_a_followed_cache_gives_what_no_cache_gives(attached, tokenizer, how):
    model, rule = attached
    cache = kvc.compress(model, tokenizer, TEXTS[0], 0.5)
    held = cache.lengths.tolist()
    question = tokens_of(tokenizer, QUESTION)
    found = model.generate(**cache.followed_by(question), **SETTINGS, **how)
    ids = marked(tokenizer, rule, TEXTS[0]) + question[0].tolist()
    plain = {name: value for name, value in how.items() if name.startswith("num")}
    expected = without_a_cache(model, rule, ids, **SETTINGS, **plain)
    assert found[:, question.shape[1] :].tolist() == expected.tolist()
    assert cache.lengths.tolist() == held


def test_several_samples_of_a_row_differ_and_each_goes_on_from_itself(attached, tokenizer):
    model, rule = attached
    cache = kvc.compress(model, tokenizer, TEXTS, 0.5)
    question = tokens_of(tokenizer, QUESTION).repeat(2, 1)
    torch.manual_seed(0)
    found = model.generate(
        **cache.followed_by(question), do_sample=True, num_return_sequences=2, output_logits=True,
        return_dict_in_generate=True, **SETTINGS,
    )  # fmt: skip
    assert len({tuple(row) for row in found.sequences.tolist()}) == 4
    for row, sequence in enumerate(found.sequences.tolist()):
        ids = torch.tensor([marked(tokenizer, rule, TEXTS[row // 2]) + sequence[:-1]])
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits[0, -1]
        torch.testing.assert_close(found.logits[-1][row].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_new_tokens_counts_for_nothing(attached, tokenizer, side):
    model, rule = attached
    questions = [QUESTION, " one", " in the old garden"]
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(questions, return_tensors="pt", padding=True, padding_side=side)
    cache = kvc.compress(model, tokenizer, TEXTS[0], 0.5)  # one row, repeated for the questions
    found = model.generate(**cache.followed_by(batch), **SETTINGS)
    also = model.generate(**cache.followed_by(batch["input_ids"], batch["attention_mask"]), **SETTINGS)
    assert found.tolist() == also.tolist()
    for question, row in zip(questions, found):
        ids = marked(tokenizer, rule, TEXTS[0]) + tokenizer(question)["input_ids"]
        assert row[-8:].tolist() == without_a_cache(model, rule, ids, **SETTINGS)[0].tolist()


def test_texts_are_compressed_together_as_they_are_alone(attached, tokenizer):
    model, _ = attached
    together = kvc.compress(model, tokenizer, TEXTS, 0.5)
    question = tokens_of(tokenizer, QUESTION)
    found = model.generate(**together.followed_by(question.repeat(2, 1)), **SETTINGS)
    for row, text in enumerate(TEXTS):
        alone = kvc.compress(model, tokenizer, text, 0.5)
        assert together.lengths[row] == alone.length
        assert found[row].tolist() == model.generate(**alone.followed_by(question), **SETTINGS)[0].tolist()
    with pytest.raises(ValueError, match="no text to compress"):
        kvc.compress(model, tokenizer, [])
    with pytest.raises(ValueError, match="text 1 of 2: there is no text"):
        kvc.compress(model, tokenizer, [TEXTS[0], ""], 0.5)


def test_generate_reads_nothing_twice_and_drops_nothing(attached, tokenizer):
    model, rule = attached
    cache = kvc.compress(model, tokenizer, TEXTS[0], 0.5)
    text, question = tokens_of(tokenizer, TEXTS[0]), tokens_of(tokenizer, QUESTION)
    read = torch.tensor([marked(tokenizer, rule, TEXTS[0])])
    expected = model.generate(**cache.followed_by(question), **SETTINGS)[:, question.shape[1] :].tolist()
    other = read.clone()
    other[0, 3] = 7
    for ids in (
        torch.cat([text, question], dim=1),  # the whole text, as one would give it with any other cache
        question,
        question.repeat(1, 100),  # longer than what was read
        torch.cat([other, question], dim=1),
        read,  # nothing new
    ):
        for more in ({}, {"attention_mask": torch.ones_like(ids)}):
            with pytest.raises(ValueError, match=r"followed_by\(new_tokens\)"):
                model.generate(ids, past_key_values=cache, **more, **SETTINGS)
    with pytest.raises(ValueError, match="followed_by"):
        model.generate(torch.cat([read, question], dim=1), past_key_values=cache, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="use_cache=False reads all tokens again"):
        model.generate(**cache.followed_by(question), use_cache=False)
    assert cache.get_seq_length() == read.shape[1]

    # the very tokens that were read, sentinels among them, and more: once, and once again for a second turn
    whole = torch.cat([read, question], dim=1)
    how = {"suppress_tokens": [rule.cl_id, rule.cr_id], **SETTINGS}
    own = cache.followed_by(question)["past_key_values"]
    out = model.generate(whole, past_key_values=own, **how)
    assert out[:, whole.shape[1] :].tolist() == expected
    second = torch.cat([out, question], dim=1)
    expected = without_a_cache(model, rule, second[0].tolist(), **SETTINGS).tolist()
    out = model.generate(second, past_key_values=own, **how)
    assert out[:, second.shape[1] :].tolist() == expected
    with pytest.raises(ValueError, match=r"1 rows, but 3 were given: .*followed_by\(new_tokens\)"):
        model.generate(torch.cat([out, question], dim=1), past_key_values=own, num_beams=3, **SETTINGS)


def test_the_refusal_survives_saving_copies_and_peft_and_leaves_with_the_patch(attached, tokenizer, tmp_path):
    model, rule = attached
    cache = kvc.compress(model, tokenizer, TEXTS[0], 0.5)
    question = tokens_of(tokenizer, QUESTION)
    cache.save(tmp_path / "cache")
    loaded = SentinelCache.load(tmp_path / "cache")
    read = torch.tensor([marked(tokenizer, rule, TEXTS[0])])
    model.generate(torch.cat([read, question], dim=1), past_key_values=loaded, **SETTINGS)
    twin = copy.deepcopy(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for each in (twin, adapted):
        with pytest.raises(ValueError, match="followed_by"):
            each.generate(input_ids=question, past_key_values=cache)
    model.get_decoder()._sentinel_patch.remove()
    assert "generate" not in vars(model)


def test_an_assistant_helps_where_generated_text_stays(tokenizer, attached):
    model, rule = attached
    assistant = transformers.LlamaForCausalLM(model.config).double().eval()
    question = tokens_of(tokenizer, QUESTION)
    cache = kvc.compress(model, tokenizer, TEXTS[0], 0.5)
    expected = model.generate(**cache.followed_by(question), **SETTINGS)
    assert model.generate(**cache.followed_by(question), assistant_model=assistant, **SETTINGS).tolist() == (
        expected.tolist()
    )
    model.get_decoder()._sentinel_patch.remove()
    with kvc.attach(model, rule=SinkAttention(ratio=0.5)):
        cache = kvc.compress(model, tokenizer, TEXTS[0])
        with pytest.raises(ValueError, match="assisted generation needs a rule under which generated text stays"):
            model.generate(**cache.followed_by(question), assistant_model=assistant, **SETTINGS)


def test_what_cannot_follow_is_refused(attached, tokenizer):
    model, _ = attached
    cache = kvc.compress(model, tokenizer, TEXTS, 0.5)
    two = tokens_of(tokenizer, QUESTION).repeat(2, 1)
    with pytest.raises(ValueError, match="holds 2 rows, but 3 were given"):
        cache.followed_by(two[:1].repeat(3, 1))
    with pytest.raises(ValueError, match=r'tensor \(batch, new\): call the tokenizer with return_tensors="pt"'):
        cache.followed_by(tokenizer(QUESTION))
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 1\)"):
        cache.followed_by(two, two[:, :1])
    with pytest.raises(ValueError, match="every row at least one new token"):
        cache.followed_by(two, torch.tensor([[1], [0]]).expand_as(two))


def test_a_window_too_wide_for_the_ratio_is_said(tokenizer, tiny_model):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    with kvc.attach(model, tokenizer, recent_tokens=20):
        with pytest.warns(UserWarning, match=r"0\.\d\d of them: the window of 20 tokens is too wide for ratio 0.8"):
            cache = kvc.compress(model, tokenizer, TEXTS[0], 0.8)
        read = cache.logical_length
        assert cache.length > read - round(0.8 * read)
        with torch.no_grad():
            model(torch.full((1, 21), 5), past_key_values=cache)
        assert cache.length == read - round(0.8 * read) + 21
