"""How a script ends: errors that take one line, exit statuses, and what it prints."""

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
# By default a waiting thread spins. On a core that another program keeps busy it takes the time that the others need,
# and training is many times slower. Passive threads sleep, which costs an idle machine a few percent (see
# docs/operations.md).
THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
SETS_THREADS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_", "KMP_")  # a user who sets one of these has chosen
ROOT = Path(__file__).resolve().parents[2]
LAST_WORDS = 10.0  # seconds that a process waits for another to say why both end


def quiet_libraries() -> None:
    """Set the environment variables that configure the libraries, unless the user has; call before importing them.

    One of them is how torch's threads wait (`THREADS`). Processes started from here inherit them.
    """
    settings = LIBRARY_SETTINGS if is_main_process() else LIBRARY_SETTINGS | NO_PROGRESS
    if not any(name.startswith(SETS_THREADS) for name in os.environ):
        settings = settings | THREADS
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


LONGEST_LINE = 2000  # characters of a line


def printable(text: str) -> str:
    """Text, which may come from a file, as one line for a terminal: no control characters, at most `LONGEST_LINE`."""
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else " " for letter in text)
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} …"


class UsageError(ValueError):
    """The request itself is wrong: exit status 2. The message is made `printable`."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class RunError(RuntimeError):
    """The request is fine but cannot be carried out: exit status 1. The message is made `printable`."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class Interrupted(KeyboardInterrupt):
    """A signal has ended the run, and its work so far is saved: exit status 130."""


def is_main_process() -> bool:
    """Whether this is the main process, the only one that prints; known before accelerate is loaded."""
    return os.environ.get("RANK", "0") == "0"


def complain(message: str) -> None:
    """Print why the run ends as one line, once for all processes that a launcher has started on a machine.

    The main process prints, and then its launcher ends the others. On a machine without it the first process prints;
    a process that is still there after that has failed alone.
    """
    if not is_main_process():
        time.sleep(LAST_WORDS if os.environ.get("LOCAL_RANK") == "0" else 2 * LAST_WORDS)
    print(f"error: {printable(message)}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__


def run_script(main: Callable[[], None]) -> int:
    """Run a script's `main`; returns the exit status and prints user errors as one line instead of a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: not every terminal has every letter
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
        message = how_to_install(error)
    except KeyboardInterrupt as error:
        if not is_main_process():
            return 130
        status = 130
        message = str(error) or "interrupted"
    else:
        return 0
    complain(message)
    return status


def how_to_install(error: ModuleNotFoundError) -> str:
    """How to install a package that this Python lacks. Raises the error if the package is this project's own."""
    package = (error.name or "").split(".")[0]
    if not package or package == __name__.split(".")[0] or (ROOT / f"{package}.py").exists():
        raise error
    way = "`sh quickstart.sh` sets up .venv with all packages"
    if (ROOT / ".venv" / "bin" / "activate").exists():
        way = "`. .venv/bin/activate` enters the environment that has all packages"
    return f"{sys.executable} lacks the package {package}: {way}, or `pip install -r requirements.txt` adds them here"


def command_line(script: str, *arguments: object) -> str:
    """The command with which this user runs one of the project's scripts from the current folder."""
    on_path = shutil.which("python")
    python = "python" if on_path and os.path.abspath(on_path) == sys.executable else from_here(sys.executable)
    return shlex.join([python, from_here(ROOT / script), *map(from_here, arguments)])


def from_here(path: object) -> str:
    """A path as messages show it: relative if it is below the current folder."""
    path = Path(str(path))
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
