"""The preset paper from the command line, its model and data loaded from a stand-in for the Hugging Face hub."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.conftest import sentences, write_tiny_model
from tests.stand_in_hub import StandInHub

ROOT = Path(__file__).parent.parent
MODEL = "togethercomputer/RedPajama-INCITE-Base-3B-v1"
DATASET = "Salesforce/wikitext"
CONFIGURATIONS = ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
ROWS = {"test": 12, "train": 30, "validation": 12}
FLAGS = ["--preset", "paper", "--method", "kv_compression", "--bound_ratio", "0.5", "--mixed_precision", "no"]
FLAGS += ["--max_train_steps", "2", "--block_size", "32", "--max_eval_blocks", "2"]


def write_dataset(folder: Path) -> None:
    """Save rows as parquet files laid out as those of the real repository, whose README.md lists them."""
    readme = ["---", "configs:"]
    for configuration in CONFIGURATIONS:
        (folder / configuration).mkdir(parents=True)
        readme += [f"- config_name: {configuration}", "  data_files:"]
        for seed, (split, count) in enumerate(ROWS.items()):
            readme += [f"  - split: {split}", f"    path: {configuration}/{split}-*"]
            rows = pyarrow.table({"text": sentences(count, seed)})
            pyarrow.parquet.write_table(rows, folder / configuration / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("\n".join([*readme, "---", ""]))


def call(endpoint: str, home: Path, output: Path, **extra: str) -> subprocess.CompletedProcess:
    """Run the command with the hub at `endpoint` and every cache in `home`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "TRANSFORMERS_", "HUGGINGFACE_")) and not name.lower().endswith("_proxy")
    }
    environment = kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"} | extra
    command = [sys.executable, "run_clm.py", *FLAGS, "--output_dir", str(output)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def only_error(run: subprocess.CompletedProcess) -> str:
    """The one line on stderr, progress bars aside, of a run that failed before it wrote results."""
    assert run.returncode == 1, run.stderr
    assert run.stdout.splitlines()[1:] == []
    lines = [line for line in run.stderr.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    """What the stand-in serves."""
    root = tmp_path_factory.mktemp("hub")
    write_tiny_model(root / "models" / MODEL)
    write_dataset(root / "datasets" / DATASET)
    return root


@pytest.fixture(scope="module")
def loaded(repositories, tmp_path_factory):
    """A run that found everything: itself, its cache, its output folder and the stand-in, which is closed by now."""
    folder = tmp_path_factory.mktemp("loaded")
    with StandInHub(repositories) as hub:
        run = call(hub.url, folder / "cache", folder / "output")
    return run, folder / "cache", folder / "output", hub


@pytest.fixture
def closed_endpoint() -> str:
    """The address of a port of this machine at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_the_preset_loads_model_and_data_from_the_hub(loaded):
    run, _, output, hub = loaded
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == f"preset paper (asked for), results in {output}"
    results = results_of(output)
    assert (results["preset"], results["protocol"], results["model"]) == ("paper", "paper", MODEL)
    assert results["validation"]["num_blocks"] == results["num_blocks"] == 2
    assert results["validation"]["perplexity"] > 1
    assert results["training"]["steps"] == 2
    recipe = {"model_name_or_path": MODEL, "dataset_name": DATASET, "dataset_config_name": "wikitext-2-raw-v1"}
    recipe |= {"learning_rate": 2e-5, "lr_scheduler_type": "linear", "num_warmup_steps": 0, "num_train_epochs": 3}
    recipe |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "r": 16, "max_span_length": 25}
    recipe |= {"fixed_spans": True, "seed": 0}
    assert {name: results["settings"][name] for name in recipe} == recipe
    data = [request for request in hub.requests if request.endswith(".parquet 200")]
    assert data and not any("wikitext-103" in request for request in data)


def test_results_record_the_commit_of_the_model(loaded):
    _, _, output, hub = loaded
    assert results_of(output)["model_revision"] == hub.commit(f"models/{MODEL}")


def test_a_filled_cache_is_enough_offline(loaded, closed_endpoint, tmp_path):
    run, cache, output, _ = loaded
    again = call(closed_endpoint, cache, tmp_path / "output", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    results, expected = results_of(tmp_path / "output"), results_of(output)
    same = ("blocks_sha256", "model_revision", "settings")
    assert {name: results[name] for name in same} == {name: expected[name] for name in same}
    assert results["perplexity"] == pytest.approx(expected["perplexity"])


def test_a_hub_out_of_reach_is_told_in_one_line(closed_endpoint, tmp_path):
    error = only_error(call(closed_endpoint, tmp_path / "cache", tmp_path / "output"))
    assert MODEL in error
    assert "--preset embedded" in error
    assert "local files with --model_name_or_path" in error


@pytest.mark.parametrize("status", [404, 500])
def test_a_dataset_out_of_reach_is_told_in_one_line(repositories, tmp_path, status):
    with StandInHub(repositories) as hub:
        hub.broken[f"datasets/{DATASET}"] = status
        error = only_error(call(hub.url, tmp_path / "cache", tmp_path / "output"))
    assert f"the dataset {DATASET} could not be reached" in error
    assert "--preset embedded" in error
    assert "local files with --train_file and --test_file" in error
