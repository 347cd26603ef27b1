"""What a run's folder may hold, and what becomes of it: nobody's files are lost, and no results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import generate_c4
import run_clm
from kv_compression.io import hub, machine, ownership
from kv_compression.io.errors import RunError
from kv_compression.sharing import model_card
from kv_compression.training import run as training_run
from tests.conftest import sentences
from tests.runs import call_script, write_texts

ROOT = Path(__file__).parent.parent


@pytest.fixture
def call(tiny_model, tmp_path, monkeypatch, capsys):
    """Runs run_clm.py into the folder `run`; returns exit status, stdout lines and the lines of errors."""
    monkeypatch.chdir(tmp_path)
    files = write_texts(tmp_path)

    def call(*flags):
        tiny = ["--preset", "embedded", "--model_name_or_path", tiny_model, "--mixed_precision", "no"]
        tiny += ["--block_size", "32", "--max_span_length", "8", "--max_train_steps", "2", "--max_eval_blocks", "2"]
        tiny += ["--method", "kv_compression", "--bound_ratio", "0.5", "--output_dir", "run", "--skip_untrained"]
        tiny += [word for name, value in files.items() for word in (f"--{name}", value)]
        return call_script(run_clm.main, ["run_clm.py", *tiny, *flags], monkeypatch, capsys)

    return call


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MINE = [
    *("README.md", "report_2024.docx", "checkpoints/llama.pt", "checkpoints/step_00000002.safetensors"),
    *("tensorboard/events.out.tfevents.1.mine", "my_token.json", "tokenizer.json", "vocab.json", "mine.jinja"),
    *("adapter_model.safetensors", "train.log", "untrained.json", "scores_2024.json", "generation.jsonl"),
    *("generation.about.json", "results.json", "thesis.txt"),
]


@pytest.mark.parametrize("flag", [[], ["--overwrite"], ["--resume_from_checkpoint"]], ids=["plain", "over", "resume"])
@pytest.mark.parametrize("name", MINE)
def test_a_folder_with_somebody_elses_file_is_left_as_it_is(call, name, flag):
    path = Path("run") / name
    path.parent.mkdir(parents=True)
    path.write_text("years of work")
    before = content_of(Path("run"))
    status, _, errors = call(*flag)
    assert status == 2
    assert len(errors) == 1
    assert path.name in errors[0] or path.parent.name in errors[0]
    assert "choose another --output_dir" in errors[0]
    assert content_of(Path("run")) == before


def test_hidden_files_and_an_old_lock_are_no_obstacle(call):
    Path("run").mkdir()
    for name, text in [(".gitignore", "*"), (".note.partial", "mine"), ("run.lock", "")]:
        (Path("run") / name).write_text(text)
    assert call()[0] == 0
    assert call("--overwrite")[0] == 0
    assert (Path("run") / ".note.partial").read_text() == "mine"


def test_a_finished_run_is_shown_whatever_lies_beside_it_and_never_replaced(call):
    assert call()[0] == 0
    (Path("run") / "notes.txt").write_text("mine")
    status, out, _ = call()
    assert status == 0
    assert "finished already" in out[1]
    before = content_of(Path("run"))
    for flags in (["--overwrite"], ["--seed", "1"]):
        status, _, errors = call(*flags)
        assert (status, len(errors)) == (2, 1)
        assert "notes.txt" in errors[0]
    assert content_of(Path("run")) == before
    (Path("run") / "notes.txt").unlink()
    status, _, errors = call("--seed", "1")
    assert status == 2
    assert "replace them with --overwrite" in errors[0]
    assert call("--seed", "1", "--overwrite")[0] == 0
    assert json.loads((Path("run") / "results.json").read_text())["seed"] == 1
    assert list(ownership.others(Path("run"), but={"run.lock"})) == []


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "results.json"])
def test_what_was_changed_since_is_not_replaced(call, name):
    assert call()[0] == 0
    path = Path("run") / name
    path.write_text(path.read_text() + "\n\n")
    status, _, errors = call("--overwrite")
    assert (status, len(errors)) == (2, 1)
    assert f"changed since ({name})" in errors[0]
    assert path.read_text().endswith("\n\n")


def test_a_log_that_somebody_has_written_in_is_only_added_to(call):
    assert call()[0] == 0
    log = Path("run") / "train.log"
    log.write_text(log.read_text() + "my remark\n")
    assert call("--overwrite")[0] == 0
    assert log.read_text().count("step 2/2") == 2
    assert "my remark\n" in log.read_text()
    assert call("--overwrite")[0] == 0


def test_a_run_of_an_older_version_is_shown_and_not_replaced(call):
    assert call()[0] == 0
    (Path("run") / ownership.LIST).unlink()
    assert call()[0] == 0
    before = content_of(Path("run"))
    status, _, errors = call("--overwrite")
    assert (status, len(errors)) == (2, 1)
    assert "choose another --output_dir, or move them away" in errors[0]
    assert {name: text for name, text in content_of(Path("run")).items() if name != ownership.LIST} == before


def test_what_was_made_from_a_run_is_removed_with_it_and_only_if_asked(call, tmp_path, monkeypatch, capsys):
    assert call()[0] == 0
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(4, 3)))
    flags = ["--model_dir", "run", "--docs_file", docs, "--num_documents", "2", "--prefix_words", "20"]
    flags += ["--continuation_words", "3", "--num_continuations", "1", "--mixed_precision", "no"]
    argv = list(map(str, ["generate_c4.py", *flags]))
    assert call_script(generate_c4.main, argv, monkeypatch, capsys)[0] == 0
    generated = Path("run") / "generation.jsonl"
    (Path("run") / "results.json").rename("results.json")
    status, _, errors = call()
    assert status == 2
    assert "was made from an earlier run (README.md, generation.about.json, generation.jsonl)" in errors[0]
    text = generated.read_text()
    generated.write_text(text.replace('"index": 0', '"my": 1, "index": 0'))
    status, _, errors = call("--overwrite")
    assert status == 2
    assert "changed since (generation.jsonl)" in errors[0]
    generated.write_text(text)
    assert call("--overwrite")[0] == 0
    assert not generated.exists()


@pytest.mark.parametrize("error", [RunError("no card"), ValueError("bad metadata"), OSError(28, "No space left")])
def test_a_card_that_cannot_be_written_costs_no_results(call, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(model_card, "write_card", fail)
        for expected in ("test perplexity", "finished already"):
            status, out, errors = call()
            assert (status, errors) == (0, [])
            assert expected in out[1]
            assert not (Path("run") / "README.md").exists()
            assert (Path("run") / "results.json").exists()
    assert call()[0] == 0
    card = (Path("run") / "README.md").read_text()
    assert card == model_card.model_card(json.loads((Path("run") / "results.json").read_text()), "run")
    assert not (Path("run") / "checkpoints").exists()
    assert call("--overwrite")[0] == 0


def test_what_goes_wrong_after_the_results_is_one_line(call, monkeypatch, capsys):
    def fail(*_):
        raise RunError("README.md cannot be written")

    monkeypatch.setattr(model_card, "write_card", fail)
    written = []
    monkeypatch.setattr(sys.stderr, "write", written.append)
    assert call()[0] == 0
    warnings = [line for line in "".join(written).splitlines() if "warning" in line]
    assert warnings == [
        "warning: the run is finished, but README.md cannot be written: the same command tries again",
    ]


def test_the_adapter_is_on_disk_before_the_results_that_say_so(call, monkeypatch):
    there = []
    write = training_run.write_json

    def watch(path, content):
        there.append((path.name, (path.parent / "adapter_model.safetensors").exists()))
        write(path, content)

    monkeypatch.setattr(training_run, "write_json", watch)
    assert call()[0] == 0
    assert there == [("results.json", True)]


def test_a_run_killed_at_any_write_ends_as_if_it_had_not_been(tiny_run, tmp_path, tell):
    flags = [*tiny_run, "--max_train_steps", "2", "--checkpointing_steps", "1", "--checkpoints_to_keep", "1"]
    command = ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "tests.killed_at_writes", tmp_path, "3", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["troubles"] == found["left_behind"] == []
    assert found["kills"] > 10
    assert len(set(found["perplexities"])) == 1
    tell(f"killed at {found['kills']} writes; {len(found['perplexities'])} runs ended, all alike")


def test_all_files_have_the_usual_permissions(call):
    before = os.umask(0o022)
    try:
        assert call()[0] == 0
    finally:
        os.umask(before)
    found = {str(path): path.stat().st_mode & 0o777 for path in Path("run").rglob("*") if path.is_file()}
    assert "run/adapter_model.safetensors" in found
    assert set(found.values()) == {0o644}


def test_only_files_by_their_very_names_are_uploaded(tmp_path, stand_in):
    for name in ("README.md", "results.json", "tokenizer.json", "hf_token.json", "adapter_notes.txt", "mine.jinja"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("---\nlicense: mit\n---\n")
    hub.push(tmp_path / "run", "someone/run")
    assert set(stand_in.files("models/someone/run")) == {
        *("README.md", "results.json", "tokenizer.json", ".gitattributes")
    }


def test_results_name_the_commit(call, monkeypatch, tmp_path):
    monkeypatch.setattr(training_run, "commit_of_project", lambda: "0123abc+changes")
    assert call()[0] == 0
    assert json.loads((Path("run") / "results.json").read_text())["commit"] == "0123abc+changes"
    assert "| commit of the project | 0123abc+changes |" in (Path("run") / "README.md").read_text()


def test_a_commit_is_that_of_the_projects_own_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "PROJECT", tmp_path / "project")
    (tmp_path / "project").mkdir()
    assert machine.commit_of_project() is None

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "somebody's")
    assert machine.commit_of_project() is None  # of another project around it
    monkeypatch.setattr(machine, "PROJECT", tmp_path)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    found = machine.commit_of_project()
    assert len(found) == 40
    (tmp_path / "a.py").write_text("1")
    assert machine.commit_of_project() == found
    monkeypatch.delenv("GIT_DIR")
    git("add", "a.py")
    assert machine.commit_of_project() == f"{found}+changes"
    git("tag", "-a", "v1", "-m", "a tag")
    assert machine.commit_of_project() == f"{found}+changes"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit_of_project() is None
