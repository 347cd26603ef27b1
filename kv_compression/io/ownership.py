"""Writing files whole or not at all, and knowing which files the scripts have written: a list in every folder.

A file is ours if the list names it and it still holds what was written; its name alone proves nothing. A file is listed
before it is moved into place, so that a kill at any moment leaves no file of ours unlisted.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

from kv_compression.io import strict_json
from kv_compression.io.errors import UsageError

LIST = ".kv_compression_files.jsonl"  # one line per file: its path in the folder, and what it holds
LONGEST_LIST = 1 << 16  # bytes: a longer list is shortened before anything is added
# What the list says of a file that is not "sha256:…":
ANYTHING = "anything"  # ours with any content: its name is random, or it may be damaged
LOG = "log"  # a file that grows: it is appended to, and removed only if it holds what is listed
GONE = "gone"  # it was removed: a file that is there now is somebody else's
PARTIAL = ".partial"  # the ending of a file that is being written, or whose writer was killed


def file_name(text: str) -> str:
    """Text as a file's name, or a part of one: only ASCII letters, digits, ".", "_" and "-".

    Other characters become "_", and a hash at the end keeps changed names apart.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", text)
    if name == text:
        return name
    return f"{name}_{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


@cache
def file_identity(path: str | None) -> str | None:
    """A file's name and the beginning of its SHA-256, the name alone if it cannot be read; None for None."""
    if path is None:
        return None
    name = file_name(Path(path).name)
    try:
        with open(path, "rb") as file:
            return f"{name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError:
        return name


def partial_name(name: str) -> str:
    """A new name for a file while it is being written."""
    return f".{name}.{secrets.token_hex(4)}{PARTIAL}"


def usual_mode(folder: bool = False) -> int:
    """The permissions of a new file, or a `folder`, under the user's umask."""
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return (0o777 if folder else 0o666) & ~mask


def open_up(folder: Path) -> None:
    """Give a new folder and its files the usual permissions; some writers let only the owner read."""
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


def sha256(content: bytes) -> str:
    """How the list describes a file with this content."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def listed(folder: Path) -> dict[str, list[str]]:
    """What each file in the folder's list may hold, by path, in the order of listing."""
    try:
        lines = (folder / LIST).read_bytes().split(b"\n")
    except OSError:
        return {}
    found: dict[str, list[str]] = {}
    for line in lines:
        try:
            entry = strict_json.loads(line)
        except ValueError:  # its writer was killed before it wrote the file itself
            continue
        name, holds = (entry.get(key) if isinstance(entry, dict) else None for key in ("file", "holds"))
        if not isinstance(name, str) or not isinstance(holds, str) or not _is_inside(name):
            continue
        known = found.pop(name, [])
        if holds != GONE:
            found[name] = [each for each in known if each != holds] + [holds]
    return found


def _is_inside(name: str) -> bool:
    """Whether a relative path stays inside its folder; a list may come from anybody."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def announce(folder: Path, files: dict[str, str]) -> None:
    """Add files and what they hold to the folder's list, safely on disk. OSError if the disk refuses."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = b"".join(_line(name, holds) for name, holds in files.items())
    with suppress(FileNotFoundError):
        if (folder / LIST).stat().st_size > LONGEST_LIST:
            write_whole(folder / LIST, b"".join(_what_counts(folder)))
    with (folder / LIST).open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read() == b"\n" else b"\n" + lines  # after half a line
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def _line(name: str, holds: str) -> bytes:
    return json.dumps({"file": name, "holds": holds}).encode() + b"\n"


def _what_counts(folder: Path) -> Iterator[bytes]:
    """The lines of the folder's list that still matter: files that are not gone, each with its last two contents.

    Two, because a kill may have come before the last one was written.
    """
    for name, holds in listed(folder).items():
        if not is_partial(name) or os.path.lexists(folder / name):
            contents = [each for each in holds if each not in (ANYTHING, LOG)][-2:]
            yield from (_line(name, each) for each in holds if each in (ANYTHING, LOG, *contents))


def is_ours(path: Path, folder: Path | None = None) -> bool:
    """Whether the list of `folder`, by default the file's own, proves that a script has written the file as it is."""
    folder = folder or path.parent
    return _is_proven(folder, path.relative_to(folder).as_posix(), listed(folder))


def _is_proven(folder: Path, name: str, names: dict[str, list[str]]) -> bool:
    path, holds = folder / name, names.get(name, [])
    if path.is_symlink() or path.parent.resolve() != (folder.resolve() / name).parent:
        return False
    if ANYTHING in holds:
        return os.path.lexists(path)
    with suppress(OSError):
        if set(holds) - {LOG} and path.is_file():
            with path.open("rb") as file:
                return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" in holds
    return False


def check(paths: Iterable[Path], folder: Path | None = None, instead: str = "choose another place") -> None:
    """Raise UsageError for the first path that holds something that is not ours, and so must not be replaced.

    `instead` says what the user can do other than move it away.
    """
    for path in paths:
        if os.path.lexists(path) and not is_ours(path, folder):
            raise UsageError(
                f"{path} is not what these scripts have written there, or was changed since: move it away, or {instead}"
            )


def write(
    path: Path, content: bytes, folder: Path | None = None, holds: str | None = None, proven: bool = False
) -> None:
    """Write a file, whole or not at all, and list it in `folder`, by default the file's own.

    Does nothing if the file holds this content already. UsageError if something that is not ours is there, unless the
    caller has `proven` otherwise; OSError if the disk refuses.
    """
    folder = folder or path.parent
    if path.is_file() and not path.is_symlink() and path.read_bytes() == content:
        return
    if not proven:
        check([path], folder)
    partial = path.with_name(partial_name(path.name))
    names = [each.relative_to(folder).as_posix() for each in (partial, path)]
    announce(folder, {names[0]: ANYTHING, names[1]: holds or sha256(content)})
    write_whole(path, content, partial)


def stage(folder: Path) -> Path:
    """A new folder in `folder` for files that `move_in` moves into place. OSError if the disk refuses."""
    staged = folder / partial_name("files")
    announce(folder, {staged.name: ANYTHING})
    staged.mkdir()
    return staged


def move_in(staged: Path, folder: Path) -> None:
    """Move the files of a `stage` into `folder`, and list them. UsageError and OSError as in `write`."""
    found = {path.relative_to(staged): path for path in sorted(staged.rglob("*")) if path.is_file()}
    check((folder / name for name in found), folder)
    announce(folder, {name.as_posix(): sha256(path.read_bytes()) for name, path in found.items()})
    for name, path in found.items():
        path.chmod(usual_mode())  # some writers let only the owner read
        with path.open("rb") as file:
            os.fsync(file.fileno())
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, folder / name)


def others(folder: Path, but: Collection[str] = ()) -> Iterator[str]:
    """The paths in `folder` that are not ours or have changed, except hidden ones and those in `but`.

    A folder that holds nothing of ours is one path; empty folders are left out.
    """
    yield from _others(folder, "", listed(folder), but)


def _others(folder: Path, within: str, names: dict[str, list[str]], but: Collection[str]) -> Iterator[str]:
    for entry in sorted(os.scandir(folder / within), key=lambda entry: entry.name):
        name = f"{within}{entry.name}"
        if entry.name.startswith(".") or name in but:
            continue
        if entry.is_dir(follow_symlinks=False):
            if any(known.startswith(f"{name}/") for known in names):
                yield from _others(folder, f"{name}/", names, but)
            elif os.listdir(entry):
                yield f"{name}/"
        elif LOG not in names.get(name, ()) and not _is_proven(folder, name, names):
            yield name


def remove(folder: Path, which: Callable[[str], bool] = lambda name: True) -> None:
    """Remove our files in a folder for which `which` is true, and folders that this empties.

    OSError if the disk refuses.
    """
    names = listed(folder)
    there = [name for name in names if which(name) and _is_proven(folder, name, names)]
    for path in (folder / name for name in there):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    gone = [name for name in names if which(name) and not os.path.lexists(folder / name)]
    parents = {parent for name in gone for parent in (folder / name).parents} - {folder, *folder.parents}
    for parent in sorted(parents, reverse=True):  # the innermost first
        with suppress(OSError):  # it holds something else
            parent.rmdir()
    if names and not any(os.path.lexists(folder / name) for name in names):
        (folder / LIST).unlink()
    elif gone:
        announce(folder, dict.fromkeys(gone, GONE))


def is_partial(name: str) -> bool:
    """Whether a listed path is of a file that is being written, or whose writer was killed."""
    return name.endswith(PARTIAL)
