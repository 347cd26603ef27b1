"""Models whose weights lie on "meta" until a layer needs them, as offloading and device maps leave them."""

import accelerate
import pytest
import torch
import transformers

import kv_compression as kvc
from kv_compression.generation import sampling
from kv_compression.generation.documents import pick_documents, prefix_ids
from kv_compression.model.architectures import input_device
from kv_compression.model.loss import TokenLosses
from kv_compression.spans.plan import SpanPlan
from kv_compression.spans.self_information import self_information
from tests.conftest import sentences

TEXT = sentences(1, seed=9)[0]
CPU = torch.device("cpu")


def on_disk(model, folder):
    accelerate.disk_offload(model, folder, execution_device=CPU)


def in_part_on_disk(model, folder):
    places = {"gpt_neox.embed_in": "cpu", "gpt_neox.layers.1": "cpu", "gpt_neox.final_layer_norm": "cpu"}
    places |= {"gpt_neox.layers.0": "disk", "gpt_neox.rotary_emb": "cpu", "lm_head": "disk"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


WAYS = {
    "cpu": lambda model, _: accelerate.cpu_offload(model, execution_device=CPU),
    "disk": on_disk,
    "map": in_part_on_disk,
}


def pair(tiny_model, **options):
    """A tokenizer and the same model twice, both attached."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    models = [transformers.AutoModelForCausalLM.from_pretrained(tiny_model, **options).eval() for _ in range(2)]
    return tokenizer, models, [kvc.attach(model, tokenizer) for model in models]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("way", WAYS)
def test_texts_are_compressed_and_followed(tiny_model, tmp_path, way, implementation):
    tokenizer, (plain, moved), _ = pair(tiny_model, attn_implementation=implementation)
    WAYS[way](moved, tmp_path / "weights")
    assert input_device(moved) == CPU
    question = tokenizer(" the cat sees", return_tensors="pt")
    expected, found = (
        model.generate(**kvc.compress(model, tokenizer, TEXT, 0.5).followed_by(question), max_new_tokens=8)
        for model in (plain, moved)
    )
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_information_are_those_of_the_model_in_memory(tiny_model, tmp_path, way):
    _, (plain, moved), patches = pair(tiny_model)
    for patch in patches:
        patch.remove()
    WAYS[way](moved, tmp_path / "weights")
    tokens = torch.randint(5, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(self_information(moved, tokens), self_information(plain, tokens))
    with torch.no_grad():
        found, expected = (TokenLosses(model)(tokens, input_ids=tokens) for model in (moved, plain))
    torch.testing.assert_close(found, expected)


def test_documents_are_continued(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "TOKENS_PER_WORD", 100)
    tokenizer, models, patches = pair(tiny_model)
    WAYS["cpu"](models[1], tmp_path)
    documents = pick_documents(sentences(2, seed=5), 2, 20, 5)
    plan, sampler = SpanPlan(True, 0.5, 10, 0), sampling.Sampler(words=3, continuations=2)
    texts = []
    for model, patch in zip(models, patches):
        rows = [prefix_ids(document, tokenizer, patch.rule, plan, "matched") for document in documents]
        found = sampling.continue_documents(model, tokenizer, documents, rows, patch.rule, plan, sampler)
        texts.append([record["continuations"] for record in found])
    assert texts[0] == texts[1]
