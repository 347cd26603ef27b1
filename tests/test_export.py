"""Merged models: as good as the run, without peft."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers

import export_model
import kv_compression as kvc
from kv_compression.io.errors import RunError, UsageError, run_script
from kv_compression.methods.sentinels import insert_sentinels
from kv_compression.model.attention import Patch
from kv_compression.sharing import export
from kv_compression.training import loading
from tests.runs import KV, make_run, write_tied_model


@pytest.fixture(scope="module", params=["untied", "tied", "sinks"])
def run(request, tiny_model, tmp_path_factory):
    """A run of a GPT-NeoX, of a Llama with tied embeddings, or of a baseline."""
    folder = tmp_path_factory.mktemp(request.param)
    model = write_tied_model(folder / "model") if request.param == "tied" else tiny_model
    flags = {"method": "sink_attention", "bound_ratio": 0.5} if request.param == "sinks" else KV | {"sink_tokens": 1}
    return make_run(folder / "run", model, **flags)


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_plain_transformers_and_one_line_give_the_logits_of_the_run(run, tmp_path, precision):
    output = tmp_path / "new" / "whole"
    results = export.export(run, output, precision)
    kept = "bfloat16" if precision == "bf16" else "float32"
    assert results["export"] == {"dtype": kept}
    assert {"config.json", "model.safetensors", "tokenizer.json", "results.json", "README.md"} <= {
        path.name for path in output.iterdir()
    }
    assert not [path for path in output.parent.iterdir() if path != output]
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    implementation = "grouped" if precision == "bf16" else None  # in bf16 others round to other values
    model = transformers.AutoModelForCausalLM.from_pretrained(output, attn_implementation=implementation)
    assert str(model.dtype) == f"torch.{kept}"
    _, expected, _ = loading.load_run(run, "bf16" if precision == "bf16" else "no")
    with kvc.attach(model, output) as patch, Patch(expected, patch.rule), torch.no_grad():
        ids = tokenizer(" the cat sees the old dog near a red house in one garden")["input_ids"]
        if patch.rule.uses_sentinels:
            ids = insert_sentinels(ids, [(2, 6), (8, 12)], patch.rule.cl_id, patch.rule.cr_id)
            assert tokenizer.convert_tokens_to_ids(["<CL>", "<CR>"]) == [patch.rule.cl_id, patch.rule.cr_id]
        logits = [each(torch.tensor([ids]), use_cache=False).logits for each in (model, expected)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_an_export_is_made_once_and_replaces_nothing(run, tmp_path, monkeypatch, capsys):
    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["export_model.py", *flags])
        status = run_script(export_model.main)
        out, err = capsys.readouterr()
        return status, out, [line for line in err.splitlines() if line.startswith("error: ")]

    output = tmp_path / "whole"
    flags = ["--model_dir", run, "--output_dir", str(output)]
    assert call(*flags)[:2] == (0, f"{run} is exported to {output}\n")
    written = (output / "model.safetensors").stat().st_mtime_ns
    assert call(*flags)[:2] == (0, f"{output} holds this export already\n")
    status, _, errors = call(*flags, "--mixed_precision", "bf16")
    assert (status, len(errors)) == (2, 1)
    assert "holds something else already" in errors[0]
    assert (output / "model.safetensors").stat().st_mtime_ns == written
    status, _, errors = call("--model_dir", str(output), "--output_dir", str(tmp_path / "again"))
    assert status == 2
    assert "holds an exported model" in errors[0]
    assert call(*flags, "--hub_private")[0] == 2


def test_bad_folders_take_one_line(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "results.json").write_text("{")
    for output, error, words in [
        ("mine", UsageError, "holds something else"),
        ("file", UsageError, "is a file"),
        ("file/below", RunError, "cannot write"),
        ("damaged", RunError, "cannot be read"),
    ]:
        with pytest.raises(error, match=words):
            export.export(run, tmp_path / output)
    with pytest.raises(UsageError, match="inside the folder of the run"):
        export.export(run, Path(run) / "whole")
    with pytest.raises(UsageError, match="not the output folder of a finished run"):
        export.export(str(tmp_path / "mine"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "file", "mine"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_an_export_has_the_permissions_that_the_umask_leaves(run, tmp_path, umask):
    before = os.umask(umask)
    try:
        export.export(run, tmp_path / "whole")
    finally:
        os.umask(before)
    assert (tmp_path / "whole").stat().st_mode & 0o777 == 0o777 & ~umask
    files = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "whole").iterdir()}
    assert "model.safetensors" in files
    assert ".kv_compression_files.jsonl" not in files
    assert set(files.values()) == {0o666 & ~umask}


def test_what_is_broken_off_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
    with pytest.raises(RunError, match="No space left"):
        export.export(run, tmp_path / "whole")
    assert not list(tmp_path.iterdir())


def test_a_run_says_what_it_was_exported_from(run, tmp_path):
    export.export(run, tmp_path / "whole")
    mine, its = (json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("whole", run))
    assert mine.pop("export") == {"dtype": "float32"}
    assert mine == its
