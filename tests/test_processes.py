import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from kv_compression.io import errors, processes
from kv_compression.io.errors import RunError, UsageError

ROOT = Path(__file__).parent.parent


def test_two_processes_without_an_accelerator_act_together(tmp_path):
    """torchrun says nothing of the CPU: accelerate alone would have each process do everything."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("ACCELERATE_USE_CPU")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "tests" / "acting_together.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode
    assert "ZeroDivisionError: process 1" in done.stderr
    main, other = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (0, 1))
    assert [main.pop("first"), other.pop("first")] == [True, False]
    assert main == other
    assert main == {
        "processes": 2,
        "device": "cpu",
        "split_work": [[0, 0], [1, 1], [2, 0], [3, 1], [4, 0]],
        "split_work, fewer than processes": [[7, 0]],
        "on the main process": 0,
        "the main process fails": "UsageError: process 0",
        "the other fails": "RunError: process 1",
    }


def test_one_process_does_everything_itself():
    assert processes.split_work(lambda items: [item + 1 for item in items], [1, 2, 3]) == [2, 3, 4]
    assert processes.split_work(list, []) == []
    assert processes.on_main(max, 1, 2) == processes.main_first(max, 1, 2) == 2
    failure = UsageError("no")
    with pytest.raises(UsageError) as caught:
        processes.main_first(lambda: (_ for _ in ()).throw(failure))
    assert caught.value is failure


def test_an_error_is_left_to_the_main_process(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)

    def fail():
        raise RunError("no\n way")

    places = {("0", "0"): [], ("8", "0"): [errors.LAST_WORDS], ("1", "1"): [2 * errors.LAST_WORDS]}
    for (rank, local_rank), pauses in places.items():
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        waited.clear()
        assert errors.run_script(fail) == 1
        assert waited == pauses  # then the launcher has ended the process, or it has failed alone
        assert capsys.readouterr().err == "error: no way\n"


@pytest.mark.parametrize("variable", processes.REFUSED)
def test_what_accelerate_may_ask_for_and_training_cannot_do_is_refused(monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UsageError, match=f"{variable}.*configs/ddp.yaml"):
        processes.state()
    monkeypatch.setenv(variable, "false")
    processes.state()


def test_settings_of_accelerate_decide_nothing(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    found = processes.accelerator("no")
    assert (found.gradient_accumulation_steps, found.mixed_precision) == (1, "no")
    assert found.state.dynamo_plugin.backend.value == "NO"
    weight = torch.ones(1, requires_grad=True)
    found.backward((3 * weight).sum())
    assert weight.grad.item() == 3
    GradientState._reset_state()
