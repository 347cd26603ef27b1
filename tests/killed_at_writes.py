"""A program that kills run_clm.py at each of its writes in turn, and lets it end.

`python -m tests.killed_at_writes FOLDER EVERY FLAG…` kills a run at its first write, at the one EVERY later …, each
time in a new folder below FOLDER, then resumes it; prints what came of it as JSON. Processes are forked, as in
`killed_runs`.
"""

import gc
import itertools
import json
import os
import sys
from pathlib import Path

import run_clm
from kv_compression.io import ownership
from kv_compression.io.errors import run_script
from kv_compression.training import run as training_run  # noqa: F401 - imported here so that the processes need not
from kv_compression.training import run_folder

KILLED = 77


def call(flags: list[str], writes: int | None = None) -> tuple[int, str]:
    """The exit status of run_clm.py in a process of its own, and what it printed to stderr.

    It dies at its n-th write, before or behind the moment at which a file is listed or put in its place.
    """
    read, write = os.pipe()
    number = os.fork()
    if number == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(write, 2)
        left = itertools.count(0)

        def deadly(action):
            def act(*arguments, **options):
                if next(left) == writes:
                    os._exit(KILLED)
                result = action(*arguments, **options)
                if next(left) == writes:
                    os._exit(KILLED)
                return result

            return act

        os.replace, ownership.announce = deadly(os.replace), deadly(ownership.announce)
        os.unlink = deadly(os.unlink)
        sys.argv = ["run_clm.py", *flags]
        os._exit(run_script(run_clm.main))
    os.close(write)
    with os.fdopen(read, errors="replace") as file:
        told = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), told


def main(folder: Path, every: int, flags: list[str]) -> dict:
    gc.freeze()
    found = {"kills": 0, "perplexities": [], "left_behind": [], "troubles": []}
    for writes in itertools.count(0, every):
        output = folder / str(writes)
        own = [*flags, "--output_dir", str(output), "--resume_from_checkpoint"]
        status, told = call(own, writes)
        found["kills"] += status == KILLED
        again = call(own)
        if again[0] or status not in (0, KILLED):
            found["troubles"].append([writes, status, told[-300:], *again])
            continue
        found["perplexities"].append(json.loads((output / "results.json").read_text())["perplexity"])
        names = {name: (output / name).exists() for name in ("README.md", "adapter_model.safetensors")}
        found["left_behind"] += [name for name in os.listdir(output) if name == "checkpoints" or ".partial" in name]
        found["troubles"] += [[writes, name] for name, there in names.items() if not there]
        found["troubles"] += [[writes, name] for name in ownership.others(output, but={run_folder.LOCK})]
        if status != KILLED:
            return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
