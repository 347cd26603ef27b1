"""Runs that are spread over two processes, against the same in one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

from tests.test_claim_2 import ENVIRONMENT, LAUNCH

ROOT = Path(__file__).parent.parent
PROTOCOLS = {
    "matched": ["--protocol", "matched", "--max_train_steps", "24"],
    "paper": ["--protocol", "paper", "--max_train_steps", "12", "--gradient_accumulation_steps", "2"],
}
SAME = ("perplexity", "nll_per_token", "nll_per_batch", "num_targets", "num_blocks")
SAME += ("removed_fraction", "attended_fraction", "kept_keys_mean", "kept_keys_max")


def flags_of(tiny_run, protocol, folder, batch_size):
    own = ["--learning_rate", "1e-3", "--per_device_train_batch_size", str(batch_size), "--output_dir", str(folder)]
    return [str(ROOT / "run_clm.py"), *tiny_run, *PROTOCOLS[protocol], *own]


SHARDED = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
SHARDED += ["-m", "tests.sharded_on_cpus"]


def launch(programs, folder, *how, status=0, **more):
    """Run programs in two processes, one after another."""
    (folder / "programs.json").write_text(json.dumps(programs))
    environment = {**os.environ, **ENVIRONMENT, **more}
    command = [*LAUNCH, *how, str(folder / "programs.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert bool(done.returncode) == bool(status), done.stderr
    return done


@pytest.fixture(scope="module")
def alone(tiny_run, tmp_path_factory):
    """The runs in one process."""
    folder = tmp_path_factory.mktemp("alone")
    programs = [flags_of(tiny_run, protocol, folder / protocol, 4) for protocol in PROTOCOLS]
    (folder / "programs.json").write_text(json.dumps(programs))
    command = [sys.executable, "-m", "tests.launched", str(folder / "programs.json")]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, **ENVIRONMENT}, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def together(tiny_run, tmp_path_factory):
    """The same by two processes with a copy of the model each, and by two that share its weights and are cut off."""
    folder = tmp_path_factory.mktemp("together")
    programs = [flags_of(tiny_run, protocol, folder / protocol, 2) for protocol in PROTOCOLS]
    launch(programs, folder, "--multi_gpu", "-m", "tests.launched")
    program = flags_of(tiny_run, "matched", folder / "sharded", 2)
    interrupted = launch([program], folder, *SHARDED, status=1, END_AT="9")
    assert interrupted.stderr.count("interrupted after step 10 of 24: the same command with") == 1
    shutil.copytree(folder / "sharded", folder / "ended by one")
    launch([[*program, "--resume_from_checkpoint"]], folder, *SHARDED)
    program = flags_of(tiny_run, "matched", folder / "ended by one", 4)
    subprocess.run([sys.executable, *program, "--resume_from_checkpoint"], check=True, capture_output=True)
    return folder


def losses_of(folder: Path) -> list[float]:
    return [float(loss) for loss in re.findall(r"step \d+/\d+ loss ([0-9.]+)", (folder / "train.log").read_text())]


@pytest.mark.parametrize("name", ["matched", "paper", "sharded", "ended by one"])
def test_two_processes_do_what_one_does(alone, together, name, tell):
    one, two = alone / (name if name in PROTOCOLS else "matched"), together / name
    curve, other = losses_of(one), losses_of(two)
    assert len(curve) == len(other) >= 12
    assert other == pytest.approx(curve, abs=2e-5)
    found, expected = (json.loads((folder / "results.json").read_text()) for folder in (two, one))
    assert (found["num_processes"], expected["num_processes"]) == (1 if name == "ended by one" else 2, 1)
    assert found["blocks_sha256"] == expected["blocks_sha256"]
    assert found["training"]["tokens"] == expected["training"]["tokens"]
    for measured in SAME:
        assert found[measured] == pytest.approx(expected[measured], rel=1e-5), measured
    weights, others = (safetensors.torch.load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert weights.keys() == others.keys()
    furthest = max((weights[part] - others[part]).abs().max().item() for part in weights)
    assert furthest < 1e-5
    apart = max(abs(a - b) for a, b in zip(curve, other))
    tell(f"two processes against one, {name}: losses of {len(curve)} steps at most {apart:.0e} apart")
