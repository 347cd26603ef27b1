"""The flags of sweep.py. Loads no torch, so that a wrong flag is refused at once."""

import argparse
import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

from kv_compression import settings as run_settings
from kv_compression.generation.request import GenerationRequest
from kv_compression.io.errors import UsageError
from kv_compression.io.flags import Parser, add_flag, ratio
from kv_compression.methods import NAMES

RATIOS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
SET_BY_SWEEP = ("method", "bound_ratio", "seed", "protocol", "output_dir", "eval_only", "push_to_hub", "hub_private")
FILES = ("train_file", "validation_file", "test_file")
# Flags of generate_c4.py by the names that they have here.
OF_CLAIM_2 = ("docs_file", "num_documents", "num_continuations", "prefix_words", "continuation_words")
OF_CLAIM_2 = {name: name for name in (*OF_CLAIM_2, "compress_generated")} | {"batch_size": "generation_batch_size"}


def parse(description: str) -> tuple[argparse.Namespace, dict]:
    """The flags of sweep.py, and by name those for run_clm.py. UsageError if one is wrong.

    `generation` becomes the request for claim 2's continuations without its `model_dir`, None if it is not asked for.
    """
    parser = _parser(description)
    flags, others = parser.parse_known_args()
    for name in ("methods", "ratios", "seeds", "protocols", "claims"):
        parts = getattr(flags, name) or []
        setattr(flags, name, list(dict.fromkeys(value for part in parts for value in part)))
    if not set(flags.claims) <= {1, 2}:
        raise UsageError("--claims must be 1 or 1,2")
    asked = {name: value for name, here in OF_CLAIM_2.items() if (value := getattr(flags, here)) is not None}
    if 2 not in flags.claims and asked:
        raise UsageError("the flags of claim 2 need --claims 1,2")
    if flags.slurm and flags.jobs:
        raise UsageError("--jobs is for local processes: give --slurm --slurm_option array_parallelism=N")
    if flags.slurm and flags.preset == "auto":
        raise UsageError("--slurm needs --preset paper or embedded: the nodes' hardware is not known here")
    if flags.slurm_option and not flags.slurm:
        raise UsageError("--slurm_option needs --slurm")
    flags.slurm_option = dict(flags.slurm_option or ())
    if not isinstance(flags.slurm_option.get("time", 1), int):
        raise UsageError(f"--slurm_option time={flags.slurm_option['time']}: must be a number of minutes")
    if flags.folder and Path(flags.folder).exists() and not Path(flags.folder).is_dir():
        raise UsageError(f"--folder {flags.folder} is a file")
    given = _for_runs(others, parser.options())
    _check(flags, given)
    asked |= {"docs_file": os.path.abspath(flags.docs_file)} if flags.docs_file else {}
    precision = given.get("mixed_precision", "auto")
    flags.generation = GenerationRequest("", **asked, mixed_precision=precision) if 2 in flags.claims else None
    return flags, given


def _parser(description: str) -> Parser:
    parser = Parser(description=description, epilog="Any other flag is passed on to run_clm.py.")
    add = parser.add_argument_group("runs").add_argument
    add("--methods", nargs="+", type=several(str), help="methods to run besides full attention (all)")
    add("--ratios", nargs="+", type=several(ratio), help="compression ratios (0.1 0.2 … 0.9)")
    add("--seeds", nargs="+", type=several(int), help="seeds of the runs (0)")
    add("--protocols", nargs="+", type=several(str), help="paper, matched or both (the preset's)")
    add("--preset", choices=["auto", "paper", "embedded"], default="auto", help="as for run_clm.py (auto)")
    add("--claims", nargs="+", type=several(int), help="1 fine-tunes; 1,2 also generates and scores text (1)")
    add("--folder", help="where the runs go (output/sweep/<preset>)")
    add = parser.add_argument_group("where they run (default: one after another, here)").add_argument
    add("--jobs", type=positive, metavar="N", help="N runs at a time on this machine (1)")
    add("--slurm", action="store_true", help="submit the missing runs as a job array of slurm; needs submitit")
    add(
        "--slurm_option",
        nargs="+",
        action="extend",
        type=key_and_value,
        metavar="KEY=VALUE",
        help="for sbatch: partition=gpu gpus_per_node=1 time=480 (minutes) …",
    )
    add("--dry-run", action="store_true", help="print one shell line per missing run, for any other scheduler")
    group = parser.add_argument_group("claim 2, as for generate_c4.py")
    for one in fields(GenerationRequest):
        if one.name in OF_CLAIM_2:
            add_flag(group, OF_CLAIM_2[one.name], one)
    return parser


def several(kind: Callable) -> Callable[[str], list]:
    """The type of a flag that takes values separated by commas."""

    def read(text: str) -> list:
        return [kind(part) for part in text.split(",") if part]

    read.__name__ = kind.__name__
    return read


def positive(text: str) -> int:
    """The type of a flag that takes a whole number from 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def key_and_value(text: str) -> tuple[str, str | int]:
    """The type of a flag that takes KEY=VALUE; whole numbers become ints."""
    key, _, value = text.partition("=")
    if not (key.isidentifier() and value):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, for example partition=gpu, got {text}")
    return key, int(value) if value.isdecimal() else value


def _for_runs(flags: list[str], own: Iterable[str]) -> dict:
    """The flags for run_clm.py by name, with absolute paths; `own` are this script's flags.

    UsageError if the sweep sets one itself, or a file does not exist.
    """
    given, overwrite, _ = run_settings.parse(flags, also=own)
    given = {name: value for name, value in given.items() if value is not None}
    ours = [name for name in SET_BY_SWEEP if name in given] + ["overwrite"] * overwrite
    if ours:
        raise UsageError(f"--{ours[0]} is not for sweeps: use --methods, --ratios, --seeds, --protocols, --folder")
    for name in FILES:
        if name in given and not Path(given[name]).is_file():
            raise UsageError(f"--{name} {given[name]}: no such file")
    for name in {*FILES, "model_name_or_path", "tokenizer_name", "dataset_name"} & set(given):
        if os.path.exists(given[name]):
            given[name] = os.path.abspath(given[name])
    return given


def _check(flags: argparse.Namespace, given: dict) -> None:
    """Raise UsageError for values that no run can have."""
    for name, known in (("methods", NAMES), ("protocols", ("paper", "matched"))):
        for value in getattr(flags, name):
            if value not in known:
                raise UsageError(f"--{name} {value}: choose from {', '.join(known)}")
    if "kv_compression" in (flags.methods or NAMES):  # the method that takes all options
        for ratio_of_run, protocol in itertools.product(flags.ratios or RATIOS, flags.protocols or [None]):
            run = {"method": "kv_compression", "bound_ratio": ratio_of_run, "protocol": protocol}
            run_settings.check_flags(given | run | {"preset": flags.preset})
