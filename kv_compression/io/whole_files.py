"""Files that are written whole or not at all, and what they may be called."""

import hashlib
import os
import re
import secrets
from pathlib import Path

PARTIAL = ".partial"  # the ending of a file that is being written, or whose writer was killed


def file_name(text: str) -> str:
    """Text as a file's name, or a part of it, of ASCII letters, digits, ".", "_" and "-" alone.

    Another character becomes "_"; a hash at the end keeps what was changed apart from all else.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", text)
    if name == text:
        return name
    return f"{name}_{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def partial_name(name: str) -> str:
    """A new name for a file while it is being written."""
    return f".{name}.{secrets.token_hex(4)}{PARTIAL}"


def usual_mode(folder: bool = False) -> int:
    """The permissions that a new file, or a `folder`, gets here: what the user's umask leaves."""
    mask = os.umask(0o077)  # which cannot be read without being set
    os.umask(mask)
    return (0o777 if folder else 0o666) & ~mask


def open_up(folder: Path) -> None:
    """Give a new folder and its files the usual permissions; some writers make what only their owner reads."""
    for path in folder.iterdir():
        path.chmod(usual_mode())
    folder.chmod(usual_mode(folder=True))


def write_whole(path: Path, content: bytes, partial: Path | None = None) -> None:
    """Write a file as `partial` beside `path` and rename it: no reader sees half of it. OSError if the disk refuses."""
    partial = partial or path.with_name(partial_name(path.name))
    path.parent.mkdir(parents=True, exist_ok=True)
    file = partial.open("xb")
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
