"""The preset `paper` from the hub to results.json, with a tiny model and a few rows on a stand-in for the hub."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import safetensors.torch
import torch

from tests.conftest import sentences, write_tiny_model
from tests.stand_in_hub import StandInHub

SCRIPT = Path(__file__).parent.parent / "run_clm.py"
MODEL = "togethercomputer/RedPajama-INCITE-Base-3B-v1"
DATASET = "Salesforce/wikitext"
CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*
  - split: train
    path: wikitext-2-raw-v1/train-*
  - split: validation
    path: wikitext-2-raw-v1/validation-*
- config_name: wikitext-2-v1
  data_files:
  - split: test
    path: wikitext-2-v1/test-*
---
"""
PROGRESS_BAR = re.compile(r"\[\d\d:\d\d")
GATHERED = ("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_", "DISABLE_SAFETENSORS_CONVERSION")


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    """What the hub holds: fp16 weights in a pytorch_model.bin, and text with empty lines, as in the real ones."""
    root = tmp_path_factory.mktemp("repositories")
    model = root / "models" / MODEL
    write_tiny_model(model)
    weights = safetensors.torch.load_file(model / "model.safetensors")
    torch.save({name: weight.half() for name, weight in weights.items()}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    dataset = root / "datasets" / DATASET
    for seed, split in enumerate(["train", "validation", "test"]):
        rows = [row for line in sentences(40 if split == "train" else 12, seed) for row in ("", line)]
        path = dataset / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"text": rows}).to_parquet(path)
    (dataset / "wikitext-2-v1").mkdir()
    datasets.Dataset.from_dict({"text": ["another configuration"]}).to_parquet(dataset / "wikitext-2-v1/test-0.parquet")
    (dataset / "README.md").write_text(CARD)
    return root


def run_paper(folder: Path, endpoint: str, timeout: int = 240, **more: str) -> tuple[int, list[str], list[str]]:
    """Run the preset with its caches in `folder`: exit status, stdout lines, stderr lines that are no progress bar."""
    flags = ["--preset", "paper", "--method", "kv_compression", "--bound_ratio", "0.5", "--mixed_precision", "no"]
    flags += ["--max_train_steps", "2", "--block_size", "32", "--max_eval_blocks", "2", "--overwrite"]
    command = [sys.executable, str(SCRIPT), *flags, "--output_dir", str(folder / "out")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(GATHERED)}
    environment |= {"HF_HOME": str(folder / "home"), "HF_ENDPOINT": endpoint} | more
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=timeout)
    said = [line for line in run.stderr.splitlines() if line.strip() and not PROGRESS_BAR.search(line)]
    return run.returncode, run.stdout.splitlines(), said


def closed_endpoint() -> str:
    """An address on this machine where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(scope="module")
def downloaded(repositories, tmp_path_factory):
    """A run that downloads everything: its folder, the hub, closed by now, and what `run_paper` returned."""
    folder = tmp_path_factory.mktemp("paper")
    with StandInHub(repositories) as hub:
        outcome = run_paper(folder, hub.endpoint)
    return folder, hub, outcome


def test_the_paper_preset_runs_from_the_hub(downloaded):
    folder, hub, (status, out, said) = downloaded
    assert status == 0, said
    assert out[0].startswith("preset paper (asked for)")
    assert out[-1].startswith("kv_compression at ratio 0.5: test perplexity ")

    results = json.loads((folder / "out" / "results.json").read_text())
    assert (results["preset"], results["protocol"], results["model"]) == ("paper", "paper", MODEL)
    assert results["model_revision"] == hub.commit(f"models/{MODEL}")
    assert results["perplexity"] > 1
    assert results["validation"]["perplexity"] > 1
    assert results["validation"]["num_targets"] > 0
    assert results["training"]["steps"] == 2
    assert len(set(results["blocks_sha256"].values())) == 3
    recipe = {
        "dataset_name": DATASET,
        "dataset_config_name": "wikitext-2-raw-v1",
        "learning_rate": 2e-5,
        "lr_scheduler_type": "linear",
        "num_warmup_steps": 0,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "max_span_length": 25,
        "fixed_spans": True,
        "r": 16,
    }
    assert {name: results["settings"][name] for name in recipe} == recipe


def test_only_what_the_run_needs_is_asked_of_the_hub(downloaded):
    _, hub, _ = downloaded
    fetched = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
    parquet = [request for request in fetched if request.endswith(".parquet")]
    assert len(fetched) == len(set(fetched))
    assert len(parquet) == 3
    assert all("wikitext-2-raw-v1" in request for request in parquet)
    # Left to itself, transformers would ask a public service to convert the .bin, and download the weights again.
    assert not [request for request in hub.requests if "/commits/" in request or "/discussions" in request]


def test_a_finished_download_is_enough_without_a_network(downloaded):
    folder, _, _ = downloaded
    before = json.loads((folder / "out" / "results.json").read_text())
    status, _, said = run_paper(folder, closed_endpoint(), HF_HUB_OFFLINE="1")
    assert status == 0, said
    again = json.loads((folder / "out" / "results.json").read_text())
    for name in ("perplexity", "blocks_sha256", "model_revision"):
        assert again[name] == before[name]


def test_without_a_network_one_line_says_what_to_do_instead(tmp_path):
    # The hub's libraries alone would go on trying for 46 seconds.
    status, out, said = run_paper(tmp_path, closed_endpoint(), timeout=40)
    assert status == 1
    assert len(out) == 1
    assert len(said) == 1
    assert said[0].startswith(f"error: the model {MODEL} could not be reached")
    for advice in ("--preset embedded", "local files", "--model_name_or_path", "HF_HUB_OFFLINE=1"):
        assert advice in said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [404, 500])
def test_a_dataset_that_the_hub_refuses_takes_one_line(repositories, tmp_path, error):
    with StandInHub(repositories, broken={f"datasets/{DATASET}": error}) as hub:
        status, _, said = run_paper(tmp_path, hub.endpoint)
    assert status == 1
    assert len(said) == 1
    assert said[0].startswith(f"error: the dataset {DATASET} could not be reached")
    assert str(error) in said[0]
    assert "--train_file" in said[0]
    assert len([request for request in hub.requests if DATASET in request]) == 1
