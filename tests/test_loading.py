"""Merging a run's adapter a layer at a time, against merging all of it in fp32 at once."""

import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers
from peft.tuners.lora import LoraLayer

from kv_compression.model.vocabulary import add_sentinels
from kv_compression.training import loading
from kv_compression.training.loading import stored_dtype
from tests.runs import KV, make_run, write_tied_model


def store(model: str, dtype: torch.dtype, as_bin=False) -> None:
    """Store a model's weights in `dtype`, whatever its configuration says of that."""
    path = Path(model) / "model.safetensors"
    weights = {name: weight.to(dtype) for name, weight in safetensors.torch.load_file(path).items()}
    if not json.loads(path.with_name("config.json").read_text())["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).clone()
    if as_bin:
        path.unlink()
        torch.save(weights, path.with_name("pytorch_model.bin"))
    else:
        safetensors.torch.save_file(weights, path, {"format": "pt"})


@pytest.fixture(scope="module", params=["fp16", "bf16", "fp32", "fp16 .bin", "bf16 said, fp32 stored", "tied"])
def run(request, tmp_path_factory) -> tuple[str, str]:
    """A model, stored in some way, and a run on it."""
    folder = tmp_path_factory.mktemp("run")
    model = write_tied_model(folder / "model")
    config = Path(model) / "config.json"
    said = json.loads(config.read_text()) | {"tie_word_embeddings": request.param == "tied"}
    if request.param.startswith("bf16 said"):
        said["dtype"] = "bfloat16"
    config.write_text(json.dumps(said))
    dtypes = {"fp16": torch.float16, "fp16 .bin": torch.float16, "bf16": torch.bfloat16, "tied": torch.float16}
    store(model, dtypes.get(request.param, torch.float32), request.param.endswith(".bin"))
    return model, make_run(folder / "run", model, **KV)


def merged_at_once(model: str, run: str, dtype: torch.dtype):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    add_sentinels(tokenizer, plain)
    merged = peft.PeftModel.from_pretrained(plain, run).merge_and_unload()
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(dtype)
    return merged


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_merging_by_layers_gives_the_same_bits(run, precision, dtype):
    expected = merged_at_once(*run, dtype)
    _, found, _ = loading.load_run(run[1], precision)
    assert found.dtype == found.config.dtype == dtype
    for kind in ("named_parameters", "named_buffers"):
        values = dict(getattr(found, kind)())
        others = dict(getattr(expected, kind)())
        assert values.keys() == others.keys()
        for name, value in values.items():
            assert value.dtype == others[name].dtype, name
            assert torch.equal(value, others[name]), name
    tied = found.get_input_embeddings().weight.data_ptr() == found.get_output_embeddings().weight.data_ptr()
    assert tied == found.config.tie_word_embeddings


def test_one_layer_at_a_time_is_in_fp32(tmp_path, monkeypatch):
    model = write_tied_model(tmp_path / "model")
    store(model, torch.float16)
    run = make_run(tmp_path / "run", model, **KV | {"method": "local_attention", "sentinel_learning_rate": None})
    layers, seen = [], []
    made, merge = LoraLayer.__init__, peft.tuners.lora.Linear.merge

    def noted(layer, *args, **options):
        layers.append(layer)
        made(layer, *args, **options)

    def counted(layer, *args, **options):
        seen.append([one is layer for one in layers if one.get_base_layer().weight.dtype == torch.float32])
        return merge(layer, *args, **options)

    monkeypatch.setattr(LoraLayer, "__init__", noted)
    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", counted)
    loading.load_run(run, "bf16")
    assert seen == [[True]] * 8


def test_what_a_folder_stores(tmp_path):
    model = Path(write_tied_model(tmp_path / "model"))
    assert stored_dtype(model) == torch.float32
    for dtype in (torch.float16, torch.bfloat16):
        store(str(model), dtype)
        assert stored_dtype(model) == dtype
    weights = safetensors.torch.load_file(model / "model.safetensors")
    weights[next(iter(weights))] = weights[next(iter(weights))].float()
    safetensors.torch.save_file(weights, model / "model.safetensors")
    assert stored_dtype(model) == torch.float32
    (model / "model.safetensors").write_bytes(b"damaged")
    assert stored_dtype(model) == torch.float32
    assert stored_dtype(tmp_path) == stored_dtype(None) == torch.float32
