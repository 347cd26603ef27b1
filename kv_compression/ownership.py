"""Which files the scripts have written, and can prove it: a list in every folder that they write to.

A file is ours if the list names it and it still holds what was written; nothing is ours by the look of its name. A file
is listed before it is put in place, so that a kill at any moment leaves nothing of ours that is not listed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from kv_compression import strict_json
from kv_compression.errors import UsageError
from kv_compression.whole_files import PARTIAL, partial_name, usual_mode, write_whole

LIST = ".kv_compression_files.jsonl"  # a line a file: its path in the folder, and what it holds
LONGEST = 1 << 14  # bytes that the list may grow to before it is written anew
# What a file holds, if not "sha256:…":
ANYTHING = "anything"  # its name was made up for it, or it may be damaged: ours whatever it holds
LOG = "log"  # it grows: appended to, and removed only as its listed content
GONE = "gone"  # it was removed, and whoever puts a file there now is its owner


def sha256(content: bytes) -> str:
    """What the list says of a file with this content."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def listed(folder: Path) -> dict[str, list[str]]:
    """What each file in the folder's list may hold, by path; what was listed last comes last."""
    try:
        lines = (folder / LIST).read_bytes().split(b"\n")
    except OSError:
        return {}
    found: dict[str, list[str]] = {}
    for line in lines:
        try:
            entry = strict_json.loads(line)
        except ValueError:  # its writer was killed: the file it was to announce is not there
            continue
        name, holds = (entry.get(key) if isinstance(entry, dict) else None for key in ("file", "holds"))
        if not isinstance(name, str) or not isinstance(holds, str) or not _is_inside(name):
            continue
        known = found.pop(name, [])
        if holds != GONE:
            found[name] = [each for each in known if each != holds] + [holds]
    return found


def _is_inside(name: str) -> bool:
    """Whether a path leads into the folder that it is relative to; a list may come from anybody."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def announce(folder: Path, files: dict[str, str]) -> None:
    """Add files and what they hold to the folder's list, safely on disk. OSError if the disk refuses."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = b"".join(_line(name, holds) for name, holds in files.items())
    with suppress(FileNotFoundError):
        if (folder / LIST).stat().st_size > LONGEST:
            write_whole(folder / LIST, b"".join(_what_counts(folder)))
    with (folder / LIST).open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read() == b"\n" else b"\n" + lines  # after a line that is only half there
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def _line(name: str, holds: str) -> bytes:
    return json.dumps({"file": name, "holds": holds}).encode() + b"\n"


def _what_counts(folder: Path) -> Iterator[bytes]:
    """The lines of the folder's list without what is known to be gone, and of every file its last two contents only.

    Two, because a kill may have come before the last.
    """
    for name, holds in listed(folder).items():
        if not is_partial(name) or os.path.lexists(folder / name):
            contents = [each for each in holds if each not in (ANYTHING, LOG)][-2:]
            yield from (_line(name, each) for each in holds if each in (ANYTHING, LOG, *contents))


def is_ours(path: Path, folder: Path | None = None, names: dict[str, list[str]] | None = None) -> bool:
    """Whether the list of `folder`, the file's own by default, proves that a script has written the file as it is.

    `names` is what that list holds, if it has been read.
    """
    folder = folder or path.parent
    return _is_proven(folder, path.relative_to(folder).as_posix(), listed(folder) if names is None else names)


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
    """Raise UsageError for the first path where there is anything that is not ours, and must not be replaced.

    `instead` says what else its user can do than move it away.
    """
    lists: dict[Path, dict[str, list[str]]] = {}
    for path in filter(os.path.lexists, paths):
        where = folder or path.parent
        if where not in lists:
            lists[where] = listed(where)
        if not is_ours(path, where, lists[where]):
            raise UsageError(
                f"{path} is not what these scripts have written there, or was changed since: move it away, or {instead}"
            )


def write(
    path: Path, content: bytes, folder: Path | None = None, holds: str | None = None, proven: bool = False
) -> None:
    """Write a file, whole or not at all, and list it in `folder`, its own by default.

    Nothing is done if the file holds just that. UsageError if anything of somebody else is in its place, unless it is
    `proven` not to be; OSError if the disk refuses.
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
    """A new folder within `folder`, for files that `move_in` puts in their places. OSError if the disk refuses."""
    staged = folder / partial_name("files")
    announce(folder, {staged.name: ANYTHING})
    staged.mkdir()
    return staged


def move_in(staged: Path, folder: Path) -> None:
    """Put the files of a `stage` of `folder` in their places, and list them. UsageError and OSError as in `write`."""
    found = {path.relative_to(staged): path for path in sorted(staged.rglob("*")) if path.is_file()}
    check((folder / name for name in found), folder)
    announce(folder, {name.as_posix(): sha256(path.read_bytes()) for name, path in found.items()})
    for name, path in found.items():
        path.chmod(usual_mode())  # some writers make files that only their owner reads
        with path.open("rb") as file:
            os.fsync(file.fileno())
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, folder / name)


def others(folder: Path, but: Collection[str] = ()) -> Iterator[str]:
    """The paths in `folder` of what is not ours or was changed since, hidden files and those named in `but` left out.

    Folders that hold nothing of ours are named as a whole, empty ones not at all.
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
    """Remove what is ours in a folder, as far as it is `which`, and folders that are empty then.

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
    """Whether a listed path is that of a file being written, or whose writer was killed."""
    return name.endswith(PARTIAL)
