"""Which commit of this project is running."""

import os
import subprocess
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
SECONDS = 5.0  # for git to answer: a disk may be slow, a run does not wait for it


def commit_of_project() -> str | None:
    """The commit that is checked out, with "+changes" if tracked files differ from it.

    None without a checkout of the project itself, or where git is missing, refuses or takes too long.
    """
    if not (PROJECT / ".git").exists():  # installed, perhaps below somebody else's checkout
        return None
    command = ["git", "--no-optional-locks", "-C", str(PROJECT), "describe", "--always", "--exclude=*", "--abbrev=40"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            [*command, "--dirty=+changes"], env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
