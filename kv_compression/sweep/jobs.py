"""Many runs, done by any number of workers that share a folder and nothing else.

A job is a run's commands and how to tell that their work is done already. Knows commands and files; what a run does is
the scripts' business, who carries it out that of `claims`.
"""

import hashlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from kv_compression import settings as run_settings
from kv_compression.data import embedded, reading
from kv_compression.generation import documents, records, scorers
from kv_compression.io import strict_json
from kv_compression.io.errors import RunError, UsageError, one_line
from kv_compression.io.processes import END_WITH_PARENT
from kv_compression.io.results import RESULTS, read_results
from kv_compression.methods import METHODS
from kv_compression.methods.full_attention import FullAttention
from kv_compression.settings import Settings
from kv_compression.sweep.claims import Claim, Claims, GivenUp
from kv_compression.training import run_folder

SCRIPTS = Path(__file__).resolve().parents[2]
FULL = FullAttention.name  # full attention, the baseline
POLL = 5.0  # seconds between looks at what other workers do
GRACE = 90.0  # seconds for a command to go when it is told to: a run finishes its step and writes a checkpoint


class Run(NamedTuple):
    """One run of a sweep."""

    method: str
    ratio: float
    protocol: str
    seed: int = 0
    eval_only: bool = False
    own_schedule: bool = False  # is another protocol's training another, even without sentinels?

    @property
    def name(self) -> str:
        """Its folder within the sweep's."""
        name = f"{self.method}_{self.ratio}"
        if self.protocol == "paper" and (self.own_schedule or METHODS[self.method].uses_sentinels):
            name += "_paper"
        if self.seed:
            name += f"_seed{self.seed}"
        return name + ("_untrained" if self.eval_only else "")

    def flags(self, given: dict) -> list[str]:
        """Its flags of run_clm.py, on top of those `given` to all runs (by name).

        The untouched model is scored by the one run that does nothing else. Options of KV compression are not for
        other methods, but for the sinks of sink attention.
        """
        others = run_settings.options_of_others(self.method)
        own = {"method": self.method, "bound_ratio": self.ratio, "protocol": self.protocol, "seed": self.seed}
        own |= {"eval_only": True} if self.eval_only else {"skip_untrained": True, "resume_from_checkpoint": True}
        return as_flags(own | {name: value for name, value in given.items() if name not in others})


def as_flags(values: dict) -> list[str]:
    """Values by name as the flags that give them."""
    words = []
    for name, value in values.items():
        if value is not None:
            parts = value if isinstance(value, tuple) else () if value is True else (value,)
            words += [f"--{name}", *map(str, parts)]
    return words


def plan(
    methods: Sequence[str],
    ratios: Sequence[float],
    seeds: Sequence[int],
    protocols: Sequence[str],
    accumulation: int = 1,
) -> list[Run]:
    """All runs, in an order of which any beginning makes a report: a seed's baseline, then its ratios as `spread`.

    A method without sentinels reads the same blocks in both protocols, and results hold both ways of averaging: it
    runs once, unless there are steps of `accumulation`, with which learning rates differ.
    """
    apart = accumulation > 1
    shared = protocols if apart else ["matched" if "matched" in protocols else "paper"]
    runs = []
    for seed in seeds:
        runs += [Run(FULL, 0.0, protocol, seed) for protocol in shared]
        if seed == seeds[0]:  # nothing is drawn: one for all seeds
            runs += [Run(FULL, 0.0, protocol, eval_only=True) for protocol in shared]
        for ratio in spread(ratios):
            for method in methods:
                own = protocols if METHODS[method].uses_sentinels else shared
                runs += [Run(method, ratio, protocol, seed) for protocol in own if method != FULL]
    return [run._replace(own_schedule=apart) for run in runs]


def spread(values: Sequence[float]) -> list[float]:
    """The middle, the ends, then what halves the gaps, so that any beginning covers the range."""
    values = sorted(set(values))
    last = len(values) - 1
    order, gaps = [last // 2, last, 0], [(last // 2, last), (0, last // 2)]
    for low, high in gaps:
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            gaps += [(middle, high), (low, middle)]
    return [values[index] for index in dict.fromkeys(order)]


class Step(NamedTuple):
    """A command and whether its work is done, which may raise UsageError or RunError."""

    command: list[str]
    done: Callable[[], bool]


class Job(NamedTuple):
    """What a worker claims: a run and what is made of it."""

    name: str
    steps: Sequence[Step]

    def missing(self) -> list[list[str]]:
        """The commands that are still to be run."""
        return [step.command for step in self.steps if not step.done()]


def fine_tuning(settings: Settings, flags: Sequence[str], any_of: Sequence[str]) -> Step:
    """Claim 1's run of these settings, which `flags` stand for.

    Results count with other values of the settings named in `any_of`, and of those that the method has no use for.
    """
    if not METHODS[settings.method].uses_sentinels:
        any_of = [*any_of, "protocol", "fixed_spans"]

    def done() -> bool:
        found = (read_results(Path(settings.output_dir)) or {}).get("settings") or {}
        there = {name: found[name] for name in any_of if name in found}
        return run_folder.finished(replace(settings, **there), overwrite=False) is not None

    return Step([sys.executable, str(SCRIPTS / "run_clm.py"), *flags], done)


@dataclass(frozen=True)
class Continuations:
    """What claim 2 asks of every fine-tuned model, by the names of generate_c4.py's flags."""

    docs_file: str | None = None
    num_documents: int = 200
    num_continuations: int = 8
    batch_size: int = 4
    prefix_words: int = 128
    continuation_words: int = 64
    mixed_precision: str = "auto"
    compress_generated: bool | None = None  # None: not asked for

    def about(self, preset: str) -> dict:
        """What a generation file is told to be made from, and `documents`, how many it continues.

        Which documents is told too, unless they are C4's, which would have to be streamed.
        """
        about = {"prefix_words": self.prefix_words, "words": self.continuation_words, "documents": self.num_documents}
        about |= {"continuations": self.num_continuations, "batch_size": self.batch_size}
        if self.mixed_precision != "auto":
            about["mixed_precision"] = self.mixed_precision
        about["compress_generated"] = bool(self.compress_generated)
        if self.docs_file:
            texts = reading.read_texts(self.docs_file, "docs_file")
        elif preset == "embedded":
            texts = embedded.embedded_text()["test"]["text"]
        else:
            return about
        found = documents.pick_documents(texts, self.num_documents, self.prefix_words, self.continuation_words)
        return about | {"documents": len(found), "documents_sha256": documents.documents_digest(found)}


def generating(folder: Path, flags: Sequence[str], about: dict) -> Step:
    """Claim 2's first half for the run in `folder`."""
    path = folder / "generation.jsonl"

    def done() -> bool:
        found = records.read_about(path)
        if found is None or not path.is_file():
            return False
        found |= {"documents": len({record["index"] for record in records.usable(records.read(path)[0])})}
        expected = about | {"results_sha256": _sha256(records.read_bytes(folder / RESULTS))}
        return all(found.get(name) == value for name, value in expected.items())

    return Step([sys.executable, str(SCRIPTS / "generate_c4.py"), "--model_dir", str(folder), *flags], done)


def scoring(folder: Path, preset: str) -> Step:
    """Claim 2's second half for the run in `folder`."""
    path, models = folder / "generation.jsonl", scorers.scorers(preset, None, None)

    def done() -> bool:
        try:
            found = strict_json.read(folder / "scores.json")
            made_from = {"file_sha256": _sha256(path.read_bytes())}
        except (OSError, ValueError):
            return False
        made_from |= models.record()
        return isinstance(found, dict) and all(found.get(name) == value for name, value in made_from.items())

    return Step([sys.executable, str(SCRIPTS / "eval_generation.py"), str(path)], done)


def jobs(
    runs: Sequence[Run],
    folder: Path,
    given: dict,
    settings_of: Callable[[list[str]], Settings],
    continuations: Continuations | None = None,
) -> list[Job]:
    """The jobs of runs below `folder`, with claim 2's part where `continuations` are asked for.

    `given` are run_clm.py's flags for all of them, `settings_of` reads such flags. UsageError if a run cannot be.
    """
    # What is left to the machine may differ between workers.
    any_of = [name for name in ("mixed_precision", "attn_implementation") if given.get(name, "auto") == "auto"]
    any_of += ["num_processes"]
    found, about = [], {}
    for run in runs:
        target = folder / run.name
        flags = run.flags(given | {"output_dir": str(target)})
        settings = settings_of(flags)
        steps = [fine_tuning(settings, flags, any_of)]
        if continuations and not run.eval_only:
            about = about or continuations.about(settings.preset)
            steps += [generating(target, as_flags(asdict(continuations)), about), scoring(target, settings.preset)]
        found.append(Job(run.name, steps))
    return found


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def work(jobs: Sequence[Job], claims: Claims) -> dict[str, str]:
    """Do what is missing, the first that is free first, until nothing is left; returns what nobody could do."""
    failed: dict[str, str] = {}
    everything = jobs
    while jobs := [job for job in jobs if _missing(job, failed)]:
        taken = next(((job, claim) for job in jobs if (claim := claims.take(job.name))), None)
        if taken is None:  # whoever has them may yet fail or die
            time.sleep(min(POLL, claims.beat))
            continue
        job, claim = taken
        try:
            print(f"{job.name}, {len(jobs)} to go", flush=True)
            _carry_out(job, claim, failed)
        except GivenUp:
            print(f"{job.name}: another worker has taken over", flush=True)
        finally:
            claim.release()
    return {job.name: failed[job.name] for job in everything if job.name in failed and not _finished(job)}


def _finished(job: Job) -> bool:
    """Whether another worker has done what failed here."""
    with suppress(UsageError, RunError, OSError):
        return not job.missing()
    return False


def show(jobs: Sequence[Job], claims: Claims) -> dict[str, str]:
    """Print the commands of what is missing and in nobody's hands, a line a job; returns what failed, as `work`."""
    failed: dict[str, str] = {}
    for job in jobs:
        commands = _missing(job, failed)
        if commands and not claims.held(job.name):
            print(" && ".join(map(shlex.join, commands)))
    return failed


def _missing(job: Job, failed: dict[str, str]) -> list[list[str]]:
    """The job's missing commands; none if it has failed or fails now."""
    try:
        return [] if job.name in failed else job.missing()
    except (UsageError, RunError, OSError) as error:
        failed[job.name] = one_line(error)
        return []


def _carry_out(job: Job, claim: Claim, failed: dict[str, str]) -> None:
    """Run the job's commands; what another worker did before the claim was taken is left out."""
    for command in _missing(job, failed):
        status = _call(command, claim)
        if status:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            failed[job.name] = f"{Path(command[1]).name} ended with {how}"
            return
    if _missing(job, failed):
        failed[job.name] = "all commands ended well, and yet their results are not there"


def _call(command: list[str], claim: Claim) -> int:
    """The exit status of a command; the claim is kept while it runs, and it does not outlive this worker.

    It is in a process group of its own, so that of a Ctrl-C it hears once, from this worker.
    """
    child = subprocess.Popen(command, process_group=0, preexec_fn=END_WITH_PARENT)
    try:
        while True:
            try:
                return child.wait(timeout=claim.claims.beat)
            except subprocess.TimeoutExpired:
                claim.keep()
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=GRACE)
            finally:  # whoever interrupts again does not want to wait
                child.kill()
                child.wait()
