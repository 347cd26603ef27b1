"""Many runs: methods × ratios × seeds × protocols, done by any number of workers that share a folder.

Parses flags, calls `kv_compression.sweep`. Flags that are not its own are passed on to run_clm.py.
"""

import argparse
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from kv_compression import settings as run_settings
from kv_compression.io.errors import RunError, UsageError, command_line, quiet_libraries, run_script
from kv_compression.io.flags import Parser, ratio
from kv_compression.methods import NAMES

RATIOS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
SET_HERE = ("method", "bound_ratio", "seed", "protocol", "output_dir", "eval_only", "push_to_hub", "hub_private")
FILES = ("train_file", "validation_file", "test_file")
OF_CLAIM_2 = ("docs_file", "num_documents", "num_continuations", "batch_size", "prefix_words", "continuation_words")
OF_CLAIM_2 += ("compress_generated",)


def parse() -> tuple[argparse.Namespace, dict]:
    """The flags of this script, and those for run_clm.py by name."""
    parser = Parser(
        description=__doc__.splitlines()[0], epilog="Any other flag is passed on to run_clm.py.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--methods", nargs="+", type=several(str), help="besides full attention (all)")
    add("--ratios", nargs="+", type=several(ratio), help="compression ratios (0.1 0.2 … 0.9)")
    add("--seeds", nargs="+", type=several(int), help="(0)")
    add("--protocols", nargs="+", type=several(str), help="paper, matched or both (the preset's)")
    add("--preset", choices=["auto", "paper", "embedded"], default="auto", help="(auto)")
    add("--claims", nargs="+", type=several(int), help="1 fine-tunes; 1,2 generates and scores text, too (1)")
    add("--folder", help="where the runs go, the same for all workers (output/sweep/<preset>)")
    add("--claim_timeout", type=float, default=600.0, help="seconds of silence after which a worker is dead (600)")
    add("--dry-run", action="store_true", help="print what is missing, a run's commands on one line")
    add("--docs_file", help="claim 2: as for generate_c4.py")
    add("--num_documents", type=positive, help="claim 2: (200)")
    add("--num_continuations", type=positive, help="claim 2: (8)")
    add("--generation_batch_size", type=positive, dest="batch_size", help="claim 2: documents at a time (4)")
    add("--prefix_words", type=positive, help="claim 2: (128)")
    add("--continuation_words", type=positive, help="claim 2: (64)")
    add("--compress_generated", action="store_true", default=None, help="claim 2: fold what is generated, too")
    flags, passed = parser.parse_known_args()
    for name in ("methods", "ratios", "seeds", "protocols", "claims"):
        parts = getattr(flags, name) or []
        setattr(flags, name, list(dict.fromkeys(value for part in parts for value in part)))
    if not set(flags.claims) <= {1, 2}:
        raise UsageError("--claims must be 1 or 1,2")
    if 2 not in flags.claims and any(getattr(flags, name) is not None for name in OF_CLAIM_2):
        raise UsageError("the flags of claim 2 need --claims 1,2")
    if not 1 <= flags.claim_timeout < float("inf"):
        raise UsageError(f"--claim_timeout must be at least 1, got {flags.claim_timeout}")
    if flags.folder and Path(flags.folder).exists() and not Path(flags.folder).is_dir():
        raise UsageError(f"--folder {flags.folder} is a file")
    return flags, to_pass_on(passed, parser.options())


def several(kind: Callable) -> Callable[[str], list]:
    """The type of a flag that takes values with commas between them."""

    def read(text: str) -> list:
        return [kind(part) for part in text.split(",") if part]

    read.__name__ = kind.__name__
    return read


def positive(text: str) -> int:
    """The type of a flag that takes a number from 1 on."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def to_pass_on(flags: list[str], own: Iterable[str]) -> dict:
    """The flags for run_clm.py by name, with paths that hold wherever it is called; `own` are this script's flags.

    UsageError if the sweep sets one itself, or a file is not there.
    """
    given, overwrite, _ = run_settings.parse(flags, also=own)
    given = {name: value for name, value in given.items() if value is not None}
    ours = [name for name in SET_HERE if name in given] + ["overwrite"] * overwrite
    if ours:
        raise UsageError(f"--{ours[0]} is not for sweeps: use --methods, --ratios, --seeds, --protocols, --folder")
    for name in FILES:
        if name in given and not Path(given[name]).is_file():
            raise UsageError(f"--{name} {given[name]}: no such file")
    for name in {*FILES, "model_name_or_path", "tokenizer_name", "dataset_name"} & set(given):
        if os.path.exists(given[name]):
            given[name] = os.path.abspath(given[name])
    return given


def check(flags: argparse.Namespace, given: dict) -> None:
    """Raise UsageError for what no run can have; loads no torch."""
    for name, known in (("methods", NAMES), ("protocols", ("paper", "matched"))):
        for value in getattr(flags, name):
            if value not in known:
                raise UsageError(f"--{name} {value}: choose from {', '.join(known)}")
    if "kv_compression" in (flags.methods or NAMES):  # which may have all options
        for ratio, protocol in itertools.product(flags.ratios or RATIOS, flags.protocols or [None]):
            of_a_run = {"method": "kv_compression", "bound_ratio": ratio, "protocol": protocol, "preset": flags.preset}
            run_settings.check_flags(given | of_a_run)


def show(folder: Path, names: list[str]) -> None:
    """Print the table of the runs of these names that are finished, and how to get the report."""
    from kv_compression.io import results

    found = [run for name in names if (run := results.read_results(folder / name)) and not run.get("eval_only")]
    if found:
        print(results.table(found))
        print(f"plots, tables and verdicts: {command_line('report.py', folder)}")


def main() -> None:
    """Run what is missing, or show it."""
    flags, given = parse()
    quiet_libraries()
    check(flags, given)
    from kv_compression.methods import METHODS
    from kv_compression.sweep import jobs as sweep_jobs
    from kv_compression.sweep.claims import Claims

    preset, _ = run_settings.choose_preset(flags.preset)
    protocols = flags.protocols or [run_settings.PRESETS[preset].get("protocol", run_settings.Settings.protocol)]
    name = "gradient_accumulation_steps"
    accumulation = given.get(
        name, run_settings.PRESETS[preset].get(name, run_settings.Settings.gradient_accumulation_steps)
    )
    asked_for = (flags.methods or list(METHODS), flags.ratios or RATIOS, flags.seeds or [0], protocols)
    runs = sweep_jobs.plan(*asked_for, accumulation)
    folder = Path(os.path.abspath(flags.folder or f"output/sweep/{preset}"))
    continuations = None
    if 2 in flags.claims:
        asked = {name: value for name in OF_CLAIM_2 if (value := getattr(flags, name)) is not None}
        asked |= {"docs_file": os.path.abspath(flags.docs_file)} if flags.docs_file else {}
        precision = given.get("mixed_precision", "auto")
        continuations = sweep_jobs.Continuations(**asked, mixed_precision=precision)

    def settings_of(words: list[str]) -> run_settings.Settings:
        return run_settings.resolve(run_settings.parse(words)[0])

    jobs = sweep_jobs.jobs(runs, folder, given | {"preset": preset}, settings_of, continuations)
    claims = Claims(folder / "claims", flags.claim_timeout)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = (sweep_jobs.show if flags.dry_run else sweep_jobs.work)(jobs, claims)
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        raise RunError(f"the sweep cannot go on in {folder}: {error}") from error
    if not flags.dry_run:
        if not failed:
            print(f"all {len(jobs)} runs are finished, in {folder}")
        show(folder, [job.name for job in jobs])
    for name, reason in failed.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_script(main))
