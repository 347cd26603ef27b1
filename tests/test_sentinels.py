import accelerate
import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from kv_compression.methods import sentinels
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.model import vocabulary
from tests import slow_rules
from tests.layouts import CL, CR, batches


@given(batches())
def test_position_ids_are_the_restated_rule(rows):
    positions = sentinels.position_ids(torch.tensor(rows), CL, CR)
    assert positions.dtype == torch.long
    assert positions.tolist() == [slow_rules.positions(row, CL, CR) for row in rows]


@given(batches())
def test_targets_are_the_restated_rule(rows):
    targets = sentinels.next_text_token(torch.tensor(rows), CL, CR)
    assert targets.dtype == torch.long
    assert targets.tolist() == [slow_rules.targets(row, CL, CR) for row in rows]


@given(batches())
def test_removed_entries_are_the_restated_rule(rows):
    removed = KVCompression(CL, CR).removed(torch.tensor(rows))
    assert removed.tolist() == [slow_rules.removed(row, CL, CR) for row in rows]


@given(st.lists(st.integers(3, 9), max_size=30), st.data())
def test_inserted_sentinels_enclose_the_spans_and_change_nothing_else(tokens, data):
    cuts = data.draw(st.lists(st.integers(0, max(len(tokens) - 1, 0)), unique=True, max_size=len(tokens)).map(sorted))
    spans = [(first, last - 1) for first, last in zip(cuts[::2], cuts[1::2])]
    out = sentinels.insert_sentinels(tokens, spans, CL, CR)
    assert [token for token in out if token not in (CL, CR)] == tokens
    enclosed, position = [], 0
    for token in out:
        if token == CL:
            enclosed.append([position])
        elif token == CR:
            enclosed[-1].append(position - 1)
        else:
            position += 1
    assert [tuple(span) for span in enclosed] == spans


def test_sentinels_are_added_once_and_start_at_the_mean(tiny_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    in_use = len(tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    cl_id, cr_id = vocabulary.add_sentinels(tokenizer, model)
    assert (cl_id, cr_id) == (in_use, in_use + 1)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = embedding.weight.detach()
        assert weight.shape[0] == in_use + 2
        torch.testing.assert_close(weight[cl_id], weight[:in_use].mean(0))
        torch.testing.assert_close(weight[cr_id], weight[:in_use].mean(0))
    assert torch.equal(model.get_input_embeddings().weight[:in_use], before)
    assert tokenizer("a <CL>cat<CR>")["input_ids"].count(cl_id) == 1

    with torch.no_grad():
        model.get_input_embeddings().weight[cl_id] = 7  # a trained sentinel stays as it is
    assert vocabulary.add_sentinels(tokenizer, model) == (cl_id, cr_id)
    assert (model.get_input_embeddings().weight[cl_id] == 7).all()
    assert model.get_input_embeddings().weight.shape[0] == in_use + 2


@pytest.mark.parametrize("tied", [False, True])
def test_spare_rows_are_used_before_the_matrix_grows(tiny_model, tied):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    config = transformers.AutoConfig.from_pretrained(tiny_model)
    config.vocab_size, config.tie_word_embeddings = len(tokenizer) + 20, tied
    model = transformers.AutoModelForCausalLM.from_config(config)
    spare = model.get_input_embeddings().weight.detach()[len(tokenizer) + 2 :].clone()
    cl_id, _ = vocabulary.add_sentinels(tokenizer, model)
    weight = model.get_input_embeddings().weight.detach()
    assert weight.shape[0] == config.vocab_size
    assert torch.equal(weight[len(tokenizer) :], spare)
    torch.testing.assert_close(weight[cl_id], weight[: len(tokenizer) - 2].mean(0))


def mean_of_rows(model, cl_id):
    return model.get_input_embeddings().weight.detach()[:cl_id].mean(0)


@pytest.mark.parametrize("spare", [0, 60])
@pytest.mark.parametrize("tied", [False, True])
def test_a_tokenizer_that_knows_the_sentinels_says_nothing_of_the_model(tiny_model, tmp_path, spare, tied):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    cl_id, cr_id = vocabulary.add_sentinels(tokenizer)
    for seed in range(2):  # a notebook's cell, run again
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=tied)
        if spare:
            model.resize_token_embeddings(len(tokenizer) + spare, mean_resizing=False)
        assert vocabulary.add_sentinels(tokenizer, model) == (cl_id, cr_id)
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            torch.testing.assert_close(embedding.weight[cl_id], embedding.weight[:cl_id].mean(0))
            torch.testing.assert_close(embedding.weight[cr_id], embedding.weight[:cl_id].mean(0))
    with torch.no_grad():
        model.get_input_embeddings().weight[cr_id] = 7  # trained
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    vocabulary.add_sentinels(tokenizer, again)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_other_sentinels_are_other_rows(tiny_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    cl_id, _ = vocabulary.add_sentinels(tokenizer, model)
    mean = mean_of_rows(model, cl_id)
    other = transformers.AutoTokenizer.from_pretrained(tiny_model)
    other.add_tokens(["<extra>"])
    with torch.no_grad():
        model.get_input_embeddings().weight[cl_id] = 7
    assert vocabulary.add_sentinels(other, model) == (cl_id + 1, cl_id + 2)
    rows = model.get_input_embeddings().weight
    assert (rows[cl_id] == 7).all()
    torch.testing.assert_close(rows[cl_id + 2], (mean * cl_id + rows[cl_id]) / (cl_id + 1))


def test_sentinels_among_the_first_tokens_start_at_the_mean_of_all_others(tiny_model):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    embedding = model.get_input_embeddings()
    expected = torch.cat([embedding.weight[:1], embedding.weight[3:]]).mean(0)
    vocabulary.start_at_mean(embedding, [1, 2], (1, 2))
    torch.testing.assert_close(embedding.weight[2], expected)


def test_rows_that_an_adapter_trains_are_left_to_it(tiny_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    cl_id, cr_id = vocabulary.add_sentinels(tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = peft.LoraConfig(target_modules=["dense"], trainable_token_indices=[cl_id, cr_id], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    before = adapted(torch.tensor([[5, cl_id, cr_id]]), output_hidden_states=True).hidden_states[0]
    vocabulary.add_sentinels(tokenizer, adapted.get_base_model())
    after = adapted(torch.tensor([[5, cl_id, cr_id]]), output_hidden_states=True).hidden_states[0]
    assert torch.equal(before, after)
    head = model.get_output_embeddings().weight
    torch.testing.assert_close(head[cr_id], head[:cl_id].mean(0))

    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match="attach before the adapter"):
        vocabulary.make_room(model, cr_id + 1, cr_id + 2)


def test_rows_that_cannot_be_set_are_refused_before_anything_changes(tiny_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokens = len(tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="embedding is offloaded: add the sentinels"):
        vocabulary.add_sentinels(tokenizer, model)
    assert len(tokenizer) == tokens
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    vocabulary.add_sentinels(tokenizer, model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert vocabulary.add_sentinels(tokenizer, model) == (tokens, tokens + 1)
