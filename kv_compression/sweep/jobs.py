"""The jobs of a sweep: each run's commands, how to tell what is done, and running what is missing."""

import argparse
import hashlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from kv_compression import settings as run_settings
from kv_compression.generation import records, scorers
from kv_compression.generation.documents import documents_digest
from kv_compression.generation.request import GenerationRequest
from kv_compression.generation.run import read_documents
from kv_compression.io import strict_json
from kv_compression.io.errors import ROOT, RunError, UsageError, command_line, one_line
from kv_compression.io.machine import choose_preset
from kv_compression.io.results import RESULTS, read_results, table
from kv_compression.methods import METHODS
from kv_compression.settings import Settings
from kv_compression.sweep.flags import RATIOS
from kv_compression.sweep.plan import PlannedRun, as_flags, plan
from kv_compression.sweep.workers import Busy, Task, Workers, is_locked
from kv_compression.training import run_folder

LOGS = "logs"  # of the commands' output, in the sweep's folder


class Step(NamedTuple):
    """A command and whether its work is done, which may raise UsageError or RunError."""

    command: list[str]
    done: Callable[[], bool]


class Job(NamedTuple):
    """The folder of a run, and the steps of claim 1 and claim 2 there."""

    folder: Path
    steps: Sequence[Step]

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.name

    def missing(self) -> list[list[str]]:
        """The commands whose work is not done. Raises what `Step.done` raises."""
        return [step.command for step in self.steps if not step.done()]


def fine_tuning(settings: Settings, flags: Sequence[str], any_of: Sequence[str]) -> Step:
    """Claim 1 with these settings, which `flags` ask for.

    Existing results may differ in the settings named in `any_of`, and in those that the method does not use.
    """
    if not METHODS[settings.method].uses_sentinels:
        any_of = [*any_of, "protocol", "fixed_spans"]

    def done() -> bool:
        found = (read_results(Path(settings.output_dir)) or {}).get("settings") or {}
        there = {name: found[name] for name in any_of if name in found}
        return run_folder.finished(replace(settings, **there), overwrite=False) is not None

    return Step([sys.executable, str(ROOT / "run_clm.py"), *flags], done)


def expected_about(request: GenerationRequest, preset: str) -> dict:
    """What the generation file of such a request records about itself, and the number of `documents` in it.

    The documents' digest is included unless they are C4's, which would have to be streamed first.
    """
    about = {"prefix_words": request.prefix_words, "words": request.continuation_words}
    about |= {"continuations": request.num_continuations, "batch_size": request.batch_size}
    about |= {"documents": request.num_documents, "compress_generated": request.compress_generated}
    if request.mixed_precision != "auto":
        about["mixed_precision"] = request.mixed_precision
    if not request.docs_file and preset != "embedded":
        return about
    found = read_documents(request, preset)
    return about | {"documents": len(found), "documents_sha256": documents_digest(found)}


def generating(folder: Path, request: GenerationRequest, about: dict) -> Step:
    """Claim 2's continuations by the run in `folder`."""
    path = folder / "generation.jsonl"

    def done() -> bool:
        found = records.read_about(path)
        if found is None or not path.is_file():
            return False
        found |= {"documents": len({record["index"] for record in records.usable(records.read(path)[0])})}
        expected = about | {"results_sha256": _sha256(records.read_bytes(folder / RESULTS))}
        return all(found.get(name) == value for name, value in expected.items())

    asked = {one.name: getattr(request, one.name) for one in fields(request) if one.name != "model_dir"}
    asked = {name: value for name, value in asked.items() if value not in (None, False)}
    return Step([sys.executable, str(ROOT / "generate_c4.py"), "--model_dir", str(folder), *as_flags(asked)], done)


def scoring(folder: Path, preset: str) -> Step:
    """Claim 2's scores of the continuations in `folder`."""
    path, models = folder / "generation.jsonl", scorers.scorers(preset, None, None)

    def done() -> bool:
        try:
            found = strict_json.read(folder / "scores.json")
            made_from = {"file_sha256": _sha256(path.read_bytes())}
        except (OSError, ValueError):
            return False
        made_from |= models.record()
        return isinstance(found, dict) and all(found.get(name) == value for name, value in made_from.items())

    return Step([sys.executable, str(ROOT / "eval_generation.py"), str(path)], done)


def planned(flags: argparse.Namespace, given: dict) -> tuple[Path, list[Job]]:
    """The sweep's folder and its jobs, from what `flags.parse` returns. UsageError if a run is not possible."""
    preset, _ = choose_preset(flags.preset)
    chosen = run_settings.PRESETS[preset] | given
    protocols = flags.protocols or [chosen.get("protocol", Settings.protocol)]
    accumulation = chosen.get("gradient_accumulation_steps", Settings.gradient_accumulation_steps)
    runs = plan(flags.methods or list(METHODS), flags.ratios or RATIOS, flags.seeds or [0], protocols, accumulation)
    folder = Path(os.path.abspath(flags.folder or f"output/sweep/{preset}"))
    return folder, make_jobs(runs, folder, given | {"preset": preset}, flags.generation)


def make_jobs(
    runs: Sequence[PlannedRun],
    folder: Path,
    given: dict,
    generation: GenerationRequest | None = None,
) -> list[Job]:
    """The jobs of runs in `folder`, with claim 2's steps if there is a request for its `generation`.

    `given` are run_clm.py's flags for all runs. UsageError if a run is not possible.
    """
    # These depend on the machine unless they are given, and machines may differ.
    any_of = [name for name in ("mixed_precision", "attn_implementation") if given.get(name, "auto") == "auto"]
    any_of += ["num_processes"]
    jobs, about = [], {}
    for run in runs:
        target = folder / run.name
        flags = run.flags(given | {"output_dir": str(target)})
        settings = run_settings.resolve(run_settings.parse(flags)[0])
        steps = [fine_tuning(settings, flags, any_of)]
        if generation and not run.eval_only:
            about = about or expected_about(generation, settings.preset)
            steps += [generating(target, generation, about), scoring(target, settings.preset)]
        jobs.append(Job(target, steps))
    return jobs


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tasks(jobs: Sequence[Job], failed: dict[str, str]) -> Iterator[Task]:
    """What is missing of each job, checked when the task is asked for; jobs that cannot be checked go to `failed`."""
    for job in jobs:
        if commands := _missing(job, failed):
            log = job.folder.parent / LOGS / f"{job.name}.log"
            yield Task(job.name, commands, job.folder / run_folder.LOCK, log)


def run_missing(jobs: Sequence[Job], workers: Workers) -> dict[str, str]:
    """Run what is missing; returns why jobs failed that are still not finished, by job."""
    failed: dict[str, str] = {}
    started, count = set(), len(list(tasks(jobs, {})))

    def announced() -> Iterator[Task]:
        for task in tasks(jobs, failed):
            started.add(task.name)
            print(f"{task.name} ({len(started)} of {count})", flush=True)
            yield task

    errors = workers.run(announced())
    for name, error in errors.items():
        if isinstance(error, Busy):
            print(f"{name}: {error}", flush=True)
        else:
            failed[name] = one_line(error)
    for job in jobs:
        if job.name in started - errors.keys() and _missing(job, failed):
            failed[job.name] = "all commands succeeded, but their results are missing"
    return {job.name: failed[job.name] for job in jobs if job.name in failed and not is_finished(job)}


def is_finished(job: Job) -> bool:
    """Whether all of a job's work is done."""
    with suppress(UsageError, RunError, OSError):
        return not job.missing()
    return False


def print_commands(jobs: Sequence[Job]) -> dict[str, str]:
    """Print a shell line for each job that is neither finished nor under way; returns failures as `run_missing`."""
    failed: dict[str, str] = {}
    for task in tasks(jobs, failed):
        if not is_locked(task.lock):
            print(" && ".join(map(shlex.join, task.commands)))
    return failed


def _missing(job: Job, failed: dict[str, str]) -> list[list[str]]:
    """The job's missing commands; none if it has failed, or fails now."""
    try:
        return [] if job.name in failed else job.missing()
    except (UsageError, RunError, OSError) as error:
        failed[job.name] = one_line(error)
        return []


def what_is_finished(jobs: Sequence[Job], folder: Path) -> str:
    """How many runs are finished, their table, and the command for the report."""
    done = sum(map(is_finished, jobs))
    lines = [f"{'all' if done == len(jobs) else f'{done} of'} {len(jobs)} runs are finished, in {folder}"]
    results = []
    for job in jobs:
        with suppress(RunError):
            results.append(read_results(job.folder))
    if results := [found for found in results if found and not found.get("eval_only")]:
        lines += [table(results), f"plots, tables and verdicts: {command_line('report.py', folder)}"]
    return "\n".join(lines)
