"""A program for the tests of `io.processes`: what two processes do, told in a folder, a file a process."""

import json
import sys
from pathlib import Path

from kv_compression.io import processes
from kv_compression.io.errors import RunError, UsageError, quiet_libraries

quiet_libraries()
folder, state = Path(sys.argv[1]), processes.state()
number = state.process_index


def first_to_come() -> bool:
    """Whether nobody has been here before."""
    came = (folder / "came").exists()
    (folder / "came").touch()
    return not came


def fail(kind: type[Exception]) -> None:
    raise kind(f"process {number}")


def failure(function, *arguments, **options) -> str:
    try:
        return f"none: {function(*arguments, **options)}"
    except (UsageError, RunError) as error:
        return f"{type(error).__name__}: {error}"


told = {
    "processes": state.num_processes,
    "device": state.device.type,
    "split_work": processes.split_work(lambda items: [[item, number] for item in items], list(range(5))),
    "split_work, fewer than processes": processes.split_work(lambda items: [[item, number] for item in items], [7]),
    "on the main process": processes.on_main(lambda: number),
    "first": processes.main_first(first_to_come),
    "the main process fails": failure(processes.on_main, fail, UsageError),
    "the other fails": failure(processes.run_everywhere, fail, RunError, here=number == 1),
}
(folder / f"{number}.json").write_text(json.dumps(told))
processes.run_everywhere(fail, ZeroDivisionError, here=number == 1)  # nobody waits for who has died of a bug
