"""Finished runs of run_clm.py with tiny models, in a second or two each."""

import json
import signal
import sys
from pathlib import Path

import transformers
from accelerate.state import AcceleratorState

from kv_compression import settings as run_settings
from kv_compression.io import errors
from kv_compression.sharing.model_card import write_card
from kv_compression.training import run as training_run
from tests.conftest import sentences, write_tiny_model

KV = {"method": "kv_compression", "bound_ratio": 0.5, "max_span_length": 8, "sentinel_learning_rate": 0.1}


def call_script(main, argv: list[str], monkeypatch, capsys) -> tuple[int, list[str], list[str]]:
    """Run a script's `main` as a program would; returns exit status, stdout lines and the lines of errors."""
    monkeypatch.setattr(sys, "argv", argv)
    status = exit_status(main)
    out, err = capsys.readouterr()
    return status, out.splitlines(), [line for line in err.splitlines() if line.startswith("error: ")]


def run_script(module, *flags) -> int:
    """Run a script's `main` as a program would; returns the exit status."""
    arguments, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, flags)]
    on_end = signal.getsignal(signal.SIGTERM)
    try:
        return exit_status(module.main)
    finally:
        sys.argv = arguments
        signal.signal(signal.SIGTERM, on_end)


def exit_status(main) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)  # a program starts with none
    try:
        return errors.run_script(main)
    except SystemExit as stop:
        return stop.code


def write_texts(folder: Path) -> dict[str, str]:
    """Texts to train on and to test with, as flags by name."""
    files = {}
    for seed, split in enumerate(["train", "test"]):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(20, seed)))
        files[f"{split}_file"] = str(path)
    return files


def write_tied_model(folder: Path) -> str:
    """A Llama whose output embedding is its input embedding."""
    write_tiny_model(folder)
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(folder))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=128, tie_word_embeddings=True, **shape, **ends
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def make_run(folder: Path, model: str, **flags) -> str:
    """A finished run in `folder`, of KV compression unless the flags say otherwise."""
    AcceleratorState._reset_state(reset_partial_state=True)
    tiny = {"preset": "embedded", "mixed_precision": "no", "block_size": 32, "max_train_steps": 4, "max_eval_blocks": 4}
    tiny |= {"model_name_or_path": model, "learning_rate": 0.01, "skip_untrained": True}
    settings = run_settings.resolve(tiny | write_texts(folder.parent) | flags | {"output_dir": str(folder)})
    training_run.run(settings, write_card=write_card)
    return str(folder)
