"""Files that are written whole or not at all, and what they may be called."""

import hashlib
import os
import re
import tempfile
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


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside `path` and rename it there: no reader sees half of it. OSError if the disk refuses."""
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL, delete=False
        ) as file:
            partial = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    finally:
        if partial and os.path.exists(partial):
            os.unlink(partial)


def remove_partial(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder, where no other can be at work."""
    for path in folder.glob(f".*{PARTIAL}"):
        path.unlink(missing_ok=True)
