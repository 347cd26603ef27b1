"""What the benchmarks' flags have in common."""

import argparse
import os
from pathlib import Path


def new_file(name: str) -> Path:
    """The type of a flag that takes a file to write, refused before anything is measured if it could not be one."""
    if os.path.lexists(name):
        raise argparse.ArgumentTypeError(f"{name} exists: name another file, or move it away")
    if not Path(name).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{Path(name).parent}: no such folder")
    return Path(name)
