"""How scripts and their users talk: flags, the two ways in which what a user gave ends a run, and how that is told."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable

LIBRARY_SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
    # Left to itself, transformers has a public service convert a model that has no safetensors.
    "DISABLE_SAFETENSORS_CONVERSION": "1",
}
NO_PROGRESS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
LAST_WORDS = 10.0  # seconds that a process leaves another to say why both end


def quiet_libraries() -> None:
    """Tell the libraries what only the environment tells them, unless the user has; call before importing them."""
    for name, value in (LIBRARY_SETTINGS if is_main_process() else LIBRARY_SETTINGS | NO_PROGRESS).items():
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
    except KeyboardInterrupt as error:
        if not is_main_process():
            return 130
        status = 130
        message = str(error) or "interrupted"
    else:
        return 0
    complain(message)
    return status


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors take one line."""

    def error(self, message: str):
        complain(f"{message} (see python {self.prog} --help)")
        self.exit(2)


def ratio(text: str) -> float:
    """The type of a flag that takes a compression ratio."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return value
