"""A tiny GPT-NeoX with a byte-level BPE tokenizer, and text that it can learn, made once per test run."""

import atexit
import os
import random
import shutil
import tempfile

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["ACCELERATE_USE_CPU"] = "1"  # the tests keep their models on the CPU, and compare with them
CACHE = tempfile.mkdtemp(prefix="kv-compression-tests-")  # no test reads or fills the user's caches
os.environ["HF_HOME"] = os.environ["XDG_CACHE_HOME"] = CACHE
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

import pytest
import tokenizers
import torch
import transformers

from tests import fuzzing

NOUNS = ["cat", "dog", "bird", "house", "garden", "river", "teacher"]
WORDS = [*NOUNS, "the", "a", "one", "two", "old", "young", "red", "quick", "sees", "hears", "follows", "in", "near"]


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


def pytest_terminal_summary(terminalreporter) -> None:
    """What the readers were tried on, whatever the verbosity."""
    for reader, tally in fuzzing.TALLIES.items():
        terminalreporter.write_line(f"fuzzed {reader}: {tally}")
