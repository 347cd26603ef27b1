"""A program that runs run_clm.py over and over in processes of its own, and kills them.

`python -m tests.killed_runs FOLDER KILLS KILLS_WHILE_WRITING FLAG…` resumes the run in FOLDER until so many kills have
struck, and then to its end; when it ends before, what it found is kept and it begins anew. Prints what happened as
JSON. Each process is forked from this one, so that the libraries are imported once.
"""

import gc
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import run_clm
from kv_compression.io.errors import run_script
from kv_compression.training import run as training_run  # noqa: F401 - imported here so that the processes need not


def begin(flags: list[str]) -> int:
    """Start run_clm.py in a process of its own; returns its number."""
    number = os.fork()
    if number == 0:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        sys.argv = ["run_clm.py", *flags, "--resume_from_checkpoint"]
        os._exit(run_script(run_clm.main))
    return number


def has_ended(number: int) -> bool:
    """Whether a process has ended, which it may only do well."""
    ended, status = os.waitpid(number, os.WNOHANG)
    if ended and status:
        raise SystemExit(f"a run ended with status {status}")
    return bool(ended)


def half_written(folder: Path) -> set[str]:
    """Checkpoints that are being written, or were when their writer died."""
    return {name for name in names(folder / "checkpoints") if name.endswith(".partial")}


def names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:  # a run that ends removes it
        return []


def newest_step(folder: Path) -> int:
    return max((int(name[5:13]) for name in names(folder / "checkpoints") if name.startswith("step_")), default=0)


def main(folder: Path, kills: int, kills_while_writing: int, flags: list[str]) -> dict:
    gc.freeze()  # or every process looks through all that the libraries hold, longer than it is let live
    draw = random.Random(0)
    found = {"steps_at_kills": [], "half_written": 0, "results": [], "left_behind": []}
    flags = [*flags, "--output_dir", str(folder)]
    to_come = [True] * kills_while_writing + [False] * kills
    draw.shuffle(to_come)

    def keep_results() -> None:
        results = json.loads((folder / "results.json").read_text())
        kept = {name: results[name] for name in ("perplexity", "nll", "untrained")}
        found["results"].append(kept | {"loss": results["training"]["loss"]})
        found["left_behind"] += [name for name in names(folder) if name == "checkpoints" or ".partial" in name]
        shutil.rmtree(folder)

    def run_to_its_end() -> float:
        begun, process = time.monotonic(), begin(flags)
        while not has_ended(process):
            time.sleep(0.01)
        keep_results()
        return time.monotonic() - begun

    whole = run_to_its_end()
    while to_come:
        while_writing, before = to_come[-1], half_written(folder)
        process, end = begin(flags), time.monotonic() + draw.uniform(0.0, 0.9 * whole)
        while not (ended := has_ended(process)) and time.monotonic() < end:
            time.sleep(0.002)
        while while_writing and not ended and not half_written(folder) - before:
            ended = has_ended(process)
        if ended:
            keep_results()
            continue
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found["steps_at_kills"].append(newest_step(folder))
        struck = bool(half_written(folder) - before)
        found["half_written"] += struck
        if not while_writing or struck:
            to_come.pop()
        else:
            found["steps_at_kills"].pop()  # it was through before the kill struck
    run_to_its_end()
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
