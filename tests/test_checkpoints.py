"""Checkpoints as files, and runs that resume after a kill, a signal or a damaged checkpoint."""

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kv_compression.io.errors import RunError, UsageError
from kv_compression.io.tensor_files import write_tensors
from kv_compression.training.checkpoints import Checkpoints
from kv_compression.training.run_folder import only_run_in

ROOT = Path(__file__).parent.parent
ONE_THREAD = ["env", "OMP_NUM_THREADS=1"]
TENSORS = {"a": torch.arange(6.0).view(2, 3), "random": torch.tensor([1, 2], dtype=torch.uint8)}


def of(folder, **options) -> Checkpoints:
    return Checkpoints(Path(folder), {"seed": 0}, **{"steps": 2} | options)


def files(folder) -> list[Path]:
    return sorted((Path(folder) / "checkpoints").iterdir())


def test_the_newest_is_read_and_the_last_few_are_kept(tmp_path):
    checkpoints = of(tmp_path, keep=2)
    assert checkpoints.read() is None
    for step in (2, 4, 6):
        checkpoints.write(step, TENSORS | {"a": TENSORS["a"] + step}, {"tokens": step})
    found = checkpoints.read()
    assert (found.step, found.state) == (6, {"tokens": 6})
    assert torch.equal(found.tensors["a"], TENSORS["a"] + 6)
    assert found.tensors["random"].dtype == torch.uint8
    assert len(files(tmp_path)) == 2
    assert checkpoints.read(4).step == 4
    checkpoints.clear()
    assert not (tmp_path / "checkpoints").exists()


def test_they_are_due_by_steps_or_minutes(tmp_path):
    assert [of(tmp_path, steps=3).due_at(step) for step in range(1, 7)] == [False, False, True] * 2
    assert not of(tmp_path, steps=3).overdue()
    by_clock = [of(tmp_path, steps=None, minutes=minutes) for minutes in (10, 0)]
    assert [checkpoints.overdue() for checkpoints in by_clock] == [False, True]
    assert not any(checkpoints.due_at(step) for checkpoints in by_clock for step in range(1, 7))


def test_any_damage_is_noticed_and_the_one_before_taken(tmp_path, capsys):
    draw = random.Random(0)
    checkpoints = of(tmp_path)
    checkpoints.write(2, TENSORS, {})
    checkpoints.write(4, TENSORS, {})
    good = files(tmp_path)[1].read_bytes()
    for _ in range(200):
        broken = bytearray(good)
        if draw.random() < 0.3:
            broken = broken[: draw.randrange(len(broken))]
        else:
            for _ in range(draw.choice([1, 1, 8])):
                place = draw.randrange(len(broken))
                broken[place] ^= 1 << draw.randrange(8)
        if bytes(broken) != good:
            files(tmp_path)[1].write_bytes(broken)
            assert checkpoints.read().step == 2
    assert "damaged" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"step": True}, {"step": "2"}, {"state": []}, {"identity": None}, {"step": -1}])
def test_a_good_hash_over_a_wrong_note_is_damage(tmp_path, wrong):
    note = {"step": 2, "identity": {"seed": 0}, "state": {}}
    (tmp_path / "checkpoints").mkdir()
    write_tensors(tmp_path / "checkpoints" / "step_00000002.safetensors", TENSORS, note)
    assert of(tmp_path).read().step == 2
    write_tensors(tmp_path / "checkpoints" / "step_00000002.safetensors", TENSORS, note | wrong)
    assert of(tmp_path).read() is None


def test_a_disk_that_refuses_leaves_the_last_good_one(tmp_path, monkeypatch):
    checkpoints = of(tmp_path)
    checkpoints.write(2, TENSORS, {})

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError, match="No space left on device; the last good one is of step 2"):
        checkpoints.write(4, TENSORS, {})
    assert [path.name for path in files(tmp_path)] == ["step_00000002.safetensors"]
    assert checkpoints.read().step == 2


def test_other_settings_are_refused(tmp_path):
    of(tmp_path).write(2, TENSORS, {})
    with pytest.raises(UsageError, match="other settings .seed."):
        Checkpoints(tmp_path, {"seed": 1}).read()


@pytest.fixture(scope="module")
def command(tiny_run):
    """A run of some steps of a tiny model as a program."""
    run = [str(ROOT / "run_clm.py"), *tiny_run, "--max_train_steps", "60", "--checkpointing_steps", "2"]
    return [*ONE_THREAD, sys.executable, *run]  # the same bits need the same number of threads


def results_of(folder) -> dict:
    found = json.loads((Path(folder) / "results.json").read_text())
    return {name: found[name] for name in ("perplexity", "nll", "untrained")} | {"loss": found["training"]["loss"]}


@pytest.fixture(scope="module")
def unbroken(command, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    subprocess.run([*command, "--output_dir", folder], check=True, capture_output=True)
    assert not (folder / "checkpoints").exists()
    return without_seconds(results_of(folder))


def without_seconds(results: dict) -> dict:
    results["untrained"].pop("seconds")
    return results


def wait_for(folder: Path, step: int, process) -> None:
    """Until there is a checkpoint of that step or a later one."""
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        names = os.listdir(folder / "checkpoints") if (folder / "checkpoints").is_dir() else []
        if any(name.startswith("step_") and int(name[5:13]) >= step for name in names):
            return
        time.sleep(0.002)
    raise AssertionError(process.communicate())


def start(command, folder, *flags):
    return subprocess.Popen(
        [*command, "--output_dir", folder, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_run_killed_at_any_moment_gives_what_an_unbroken_one_gives(command, unbroken, tmp_path, tell):
    """Twenty SIGKILLs at random moments, and five while a checkpoint is half written."""
    flags = command[command.index(str(ROOT / "run_clm.py")) + 1 :]
    killed_runs = [*ONE_THREAD, sys.executable, "-m", "tests.killed_runs", tmp_path / "run", "20", "5", *flags]
    done = subprocess.run(killed_runs, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["steps_at_kills"]) == 25
    assert len(set(found["steps_at_kills"])) > 5
    assert found["half_written"] >= 5
    assert found["results"]
    for results in found["results"]:
        assert without_seconds(results) == unbroken
    assert found["left_behind"] == []
    tell(
        f"killed 25 times, {found['half_written']} of them while writing; {len(found['results'])} runs ended, all alike"
    )


def test_a_damaged_checkpoint_is_passed_over(command, unbroken, tmp_path):
    folder = tmp_path / "run"
    process = start(command, folder)
    wait_for(folder, 20, process)
    process.kill()
    process.communicate()
    refused = subprocess.run([*command, "--output_dir", folder], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--resume_from_checkpoint resumes it" in refused.stderr
    newest = max((folder / "checkpoints").glob("step_*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-9])
    done = subprocess.run(
        [*command, "--output_dir", folder, "--resume_from_checkpoint"], capture_output=True, text=True, check=True
    )
    assert "is damaged: looking for the one before it" in done.stdout
    assert without_seconds(results_of(folder)) == unbroken


def test_sigterm_writes_a_checkpoint_and_says_how_to_go_on(command, unbroken, tmp_path):
    folder = tmp_path / "run"
    process = start(command, folder)
    wait_for(folder, 2, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "interrupted after step" in errors
    assert "--resume_from_checkpoint resumes the run" in errors
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    subprocess.run([*command, "--output_dir", tmp_path / "other", "--resume_from_checkpoint", folder], check=True)
    assert without_seconds(results_of(tmp_path / "other")) == unbroken
    assert "step 1/" not in (tmp_path / "other" / "train.log").read_text()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == left
    subprocess.run([*command, "--output_dir", folder, "--resume_from_checkpoint", "latest"], check=True)
    assert without_seconds(results_of(folder)) == unbroken


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_run_in(tmp_path / "run"):
        (tmp_path / "run" / "a").touch()
    assert "cannot be locked (No locks available)" in caplog.text


def test_a_second_run_is_kept_out(command, tmp_path):
    with only_run_in(tmp_path / "run"):
        second = subprocess.run([*command, "--output_dir", tmp_path / "run"], capture_output=True, text=True)
    assert second.returncode == 1
    assert "another run is at work" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1


def test_a_folder_to_resume_from_has_to_hold_a_checkpoint(command, tmp_path):
    (tmp_path / "empty").mkdir()
    asked = [*command, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", tmp_path / "empty"]
    refused = subprocess.run(asked, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith("empty: no checkpoint is there; name the folder of a run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_does_not_name_a_newer_setting_had_its_default(tmp_path):
    Checkpoints(tmp_path, {"seed": 1}).write(3, {}, {})
    defaults = {"seed": 0, "weight_decay": 0.0}
    assert Checkpoints(tmp_path, {"seed": 1, "weight_decay": 0.0}, defaults=defaults).read().step == 3
    with pytest.raises(UsageError, match="other settings .weight_decay"):
        Checkpoints(tmp_path, {"seed": 1, "weight_decay": 0.1}, defaults=defaults).read()
