"""How scripts and their users talk: flags, the two ways in which what a user gave ends a run, and how that is told."""

import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

LIBRARY_SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
    # Left to itself, transformers has a public service convert a model that has no safetensors.
    "DISABLE_SAFETENSORS_CONVERSION": "1",
}
NO_PROGRESS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
# A thread that waits for others spins, and takes from a core what they need if a neighbour keeps that core busy: then
# training is many times slower. Passive threads sleep. An idle machine loses a few percent; see docs/operations.md.
THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
SETS_THREADS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_", "KMP_")  # a user of these has chosen
ROOT = Path(__file__).resolve().parents[2]
LAST_WORDS = 10.0  # seconds that a process leaves another to say why both end


def quiet_libraries() -> None:
    """Tell the libraries what only the environment tells them, unless the user has; call before importing them.

    This includes how torch's threads wait (`THREADS`). Processes that are started from here inherit it.
    """
    settings = LIBRARY_SETTINGS if is_main_process() else LIBRARY_SETTINGS | NO_PROGRESS
    if not any(name.startswith(SETS_THREADS) for name in os.environ):
        settings = settings | THREADS
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


LONGEST = 2000  # characters of a line


def printable(text: str) -> str:
    """Text that may come from a file, as one line for a terminal: no control characters, and not endless."""
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else " " for letter in text)
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} …"


class UsageError(ValueError):
    """The request itself is wrong: exit status 2. The message is made `printable`."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class RunError(RuntimeError):
    """The request is fine but cannot be carried out: exit status 1. The message is made `printable`."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class Interrupted(KeyboardInterrupt):
    """A signal has ended the run, and what was done is safe: exit status 130."""


def is_main_process() -> bool:
    """Whether this process is the one of its launch that speaks, as launchers say before accelerate can be asked."""
    return os.environ.get("RANK", "0") == "0"


def complain(message: str) -> None:
    """Print why the run ends as one line, once for all processes that a launcher has started on a machine.

    The main process says it, whereupon the launcher ends the others. Where it is on another machine the first of this
    one does, and any that is left then has failed alone.
    """
    if not is_main_process():
        time.sleep(LAST_WORDS if os.environ.get("LOCAL_RANK") == "0" else 2 * LAST_WORDS)
    print(f"error: {printable(message)}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """The first line that an exception has to say, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__


def run_script(main: Callable[[], None]) -> int:
    """Run a script's `main`; returns the exit status and prints user errors as one line instead of a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: not every terminal has every letter
    try:
        main()
    except UsageError as error:
        status = 2
        message = str(error)
    except RunError as error:
        status = 1
        message = str(error)
    except ModuleNotFoundError as error:
        status = 1
        message = way_in(error)
    except KeyboardInterrupt as error:
        if not is_main_process():
            return 130
        status = 130
        message = str(error) or "interrupted"
    else:
        return 0
    complain(message)
    return status


def way_in(error: ModuleNotFoundError) -> str:
    """What to do about a package that this Python lacks. The error itself if the package is this project's own."""
    package = (error.name or "").split(".")[0]
    if not package or package == __name__.split(".")[0] or (ROOT / f"{package}.py").exists():
        raise error
    way = "`sh quickstart.sh` sets up .venv with all packages"
    if (ROOT / ".venv" / "bin" / "activate").exists():
        way = "`. .venv/bin/activate` enters the environment that has all packages"
    return f"{sys.executable} lacks the package {package}: {way}, or `pip install -r requirements.txt` adds them here"


def command_line(script: str, *arguments: object) -> str:
    """How this user calls one of the scripts beside the package, from the folder that they are in."""
    on_path = shutil.which("python")
    python = "python" if on_path and os.path.abspath(on_path) == sys.executable else from_here(sys.executable)
    return shlex.join([python, from_here(ROOT / script), *map(from_here, arguments)])


def from_here(path: object) -> str:
    """A path as it is shown: relative where it lies below the current folder."""
    path = Path(str(path))
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
