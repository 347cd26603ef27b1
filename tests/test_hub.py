"""Uploads to a stand-in for the hub, in this process and as a user's command."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest

import export_model
import run_clm
from kv_compression.io import hub
from kv_compression.io.errors import RunError, UsageError
from tests.runs import KV, call_script, make_run, write_texts

SHARED = {"README.md", "results.json", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
SHARED |= {"tokenizer_config.json"}


@pytest.fixture
def call(tiny_model, tmp_path, monkeypatch, capsys):
    """Calls a script with flags; returns exit status, stdout lines and the lines of errors."""
    monkeypatch.chdir(tmp_path)
    files = write_texts(tmp_path)

    def call(script, *flags):
        tiny = ["--preset", "embedded", "--model_name_or_path", tiny_model, "--mixed_precision", "no"]
        tiny += ["--block_size", "32", "--max_span_length", "8", "--max_train_steps", "2", "--max_eval_blocks", "2"]
        tiny += ["--method", "kv_compression", "--bound_ratio", "0.5", "--output_dir", "out/a run"]
        tiny += [word for name, value in files.items() for word in (f"--{name}", value)]
        argv = [script.__file__, *(tiny if script is run_clm else []), *flags]
        return call_script(script.main, argv, monkeypatch, capsys)

    return call


def test_a_run_is_uploaded_and_a_finished_one_again(call, stand_in):
    status, out, errors = call(run_clm, "--push_to_hub")
    assert (status, errors) == (0, []), errors
    assert out[-1] == f"uploaded to {stand_in.endpoint}/someone/a-run"
    files = stand_in.files("models/someone/a-run")
    assert set(files) == SHARED | {".gitattributes"}
    for name in SHARED:
        assert files[name] == (Path("out/a run") / name).read_bytes()
    assert b'run = "someone/a-run"' in files["README.md"]
    assert stand_in.private == set()
    assert "push_to_hub" not in json.loads(files["results.json"])["settings"]

    trained = Path("out/a run/train.log").stat().st_mtime_ns
    status, out, errors = call(run_clm, "--push_to_hub", "other", "--hub_private")
    assert (status, errors) == (0, [])
    assert "finished already" in out[1]
    assert out[-1] == f"uploaded to {stand_in.endpoint}/someone/other"
    assert b'run = "someone/other"' in stand_in.files("models/someone/other")["README.md"]
    assert stand_in.private == {"models/someone/other"}
    assert Path("out/a run/train.log").stat().st_mtime_ns == trained
    assert call(run_clm, "--push_to_hub", "someone/other")[0] == 0  # what is there is replaced
    shutil.rmtree("out")
    assert call(run_clm)[0] == 0
    assert not any("create" in request for request in stand_in.requests[-1:])


def test_an_exported_model_is_uploaded(call, stand_in, tiny_model, tmp_path):
    run = make_run(tmp_path / "run", tiny_model, **KV)
    status, out, errors = call(
        export_model, "--model_dir", run, "--output_dir", "whole", "--push_to_hub", "someone/whole"
    )
    assert (status, errors) == (0, [])
    assert out == [f"{run} is exported to whole", f"uploaded to {stand_in.endpoint}/someone/whole"]
    assert set(stand_in.files("models/someone/whole")) == {path.name for path in Path("whole").iterdir()} | {
        ".gitattributes"
    }


@pytest.mark.parametrize(
    ("token", "flags", "status", "words"),
    [
        ("", ["--push_to_hub"], 1, "needs a token: log in with hf auth login, or set HF_TOKEN"),
        ("stale", ["--push_to_hub"], 1, "did not confirm the token"),
        ("r", ["--push_to_hub"], 1, "the token of someone may only read"),
        ("w", ["--push_to_hub", "a/b/c"], 2, "--push_to_hub a/b/c: not the name of a repository"),
        ("w", ["--push_to_hub", "what's this"], 2, "not the name of a repository"),
        ("w", ["--hub_private"], 2, "--hub_private needs --push_to_hub"),
    ],
)
def test_what_cannot_be_uploaded_is_not_trained(call, stand_in, monkeypatch, token, flags, status, words):
    monkeypatch.setenv("HF_TOKEN", token)
    found, _, errors = call(run_clm, *flags)
    assert found == status
    assert len(errors) == 1
    assert words in errors[0]
    assert not os.path.exists("out")


def test_a_refused_upload_leaves_the_run(call, stand_in):
    status, out, errors = call(run_clm, "--push_to_hub", "somebody-else/run")
    assert status == 1
    assert len(errors) == 1
    assert "could not be uploaded to somebody-else/run" in errors[0]
    assert "403" in errors[0]
    assert out[-1].startswith("kv_compression at ratio 0.5: test perplexity ")
    assert Path("out/a run/results.json").exists()
    stand_in.broken["models/someone/broken"] = 403
    status, out, errors = call(run_clm, "--push_to_hub", "broken")
    assert status == 1
    assert "finished already" in out[1]
    assert "could not be uploaded to someone/broken" in errors[0]
    assert call(run_clm, "--push_to_hub", "fine")[0] == 0


def test_the_hub_may_be_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "w")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="did not confirm the token"):
        hub.destination("", tmp_path)
    with pytest.raises(RunError, match=r"there is no results\.json of a/b"):
        hub.fetch("a/b", "results.json")
    with pytest.raises(RunError, match="the model a/b could not be reached"):
        hub.check_hub("a/b", "model", "another")
    with pytest.raises(UsageError, match="not the name"):
        hub.destination("a--b", tmp_path)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("kv_compression_0.5", "kv_compression_0.5"),
        ("a run (best)", "a-run-best"),
        ("--x..y--", "x.y"),
        ("ü", "run"),
        ("n" * 200, "n" * 96),
    ],
)
def test_any_folder_has_a_name_that_the_hub_takes(text, name):
    assert hub.repository_name(text) == name
    huggingface_hub.utils.validate_repo_id(f"someone/{name}"[:96])
