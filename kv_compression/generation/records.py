"""Generation files: JSON lines that are appended durably, continued after a kill, and read with care."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from kv_compression.io import ownership, strict_json
from kv_compression.io.errors import RunError, UsageError, one_line, printable
from kv_compression.io.fields import OF_A_GENERATION, check, is_count
from kv_compression.io.ownership import file_name
from kv_compression.io.results import write_json


def about_path(path: Path) -> Path:
    """The file beside `path` that says what made it."""
    return path.with_suffix(".about.json")


def scores_path(path: Path) -> Path:
    """The file beside `path` that holds its scores: scores.json for generation.jsonl, scores_X.json for X.jsonl."""
    return path.with_name("scores.json" if path.stem == "generation" else f"scores_{file_name(path.stem)}.json")


def read_bytes(path: Path) -> bytes:
    """A file's content. RunError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from error


def read(path: Path) -> tuple[list[dict], list[str]]:
    """The records of a file, and what is wrong with its other lines ("line 7: …"). RunError if it cannot be read."""
    records, problems = [], []
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = strict_json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            problems.append(f"line {number}: {one_line(error)}")
        else:
            records.append(record)
    return records, problems


def usable(records: list[dict]) -> list[dict]:
    """The records of documents that have been continued."""

    def is_usable(record: dict) -> bool:
        counts = [record.get(name) for name in ("index", "prefix_tokens", "cache_length")]
        return isinstance(record.get("continuations"), list) and all(map(is_count, counts)) and counts[1] > 0

    return list(filter(is_usable, records))


def kept_fraction(records: list[dict]) -> float | None:
    """Keys that the cache held of a prefix ÷ the prefix's tokens, averaged over usable records; None without any."""
    held = [record["cache_length"] / record["prefix_tokens"] for record in usable(records)]
    return sum(held) / len(held) if held else None


def is_scorable(record: dict) -> bool:
    """Whether `scoring.score_records` can score a continuation of this record."""
    index, reference, texts = (record.get(name) for name in ("index", "reference", "continuations"))
    if not isinstance(index, int) or not isinstance(reference, str) or not isinstance(texts, list):
        return False
    return bool(reference.strip()) and all(isinstance(text, str) for text in texts) and any(map(str.strip, texts))


def find_files(paths: Sequence[str]) -> list[Path]:
    """The generation files that are named or lie below a named folder: those with an .about.json beside them.

    UsageError if a named file has nothing to score; below a folder it is skipped, as one that has just begun.
    """
    found = []
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
        below = sorted(path.rglob("*.about.json")) if path.is_dir() else []
        found += [about.with_name(about.name.replace(".about.json", ".jsonl")) for about in below] or [path]
    files = []
    for path in filter(Path.is_file, dict.fromkeys(found)):
        if any(map(is_scorable, read(path)[0])):
            files.append(path)
        elif path in map(Path, paths):
            raise UsageError(f"{path} holds no continuations: name a file that generate_c4.py has written")
        else:
            print(printable(f"{path}: left out: it holds no continuations yet"))
    if not files:
        raise UsageError(f"no generation file in {', '.join(paths)}: generate_c4.py writes them")
    return files


def read_about(path: Path) -> dict | None:
    """What made the file, None if nothing says so. RunError if the file that should is damaged."""
    try:
        about = strict_json.read(about_path(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{about_path(path)} cannot be read: {one_line(error)}") from error
    if not isinstance(about, dict):
        return None
    try:
        check(about, {}, OF_A_GENERATION)
    except ValueError as error:
        raise RunError(f"{about_path(path)} {error}") from error
    return about


def continue_file(path: Path, about: dict, overwrite: bool) -> set[int]:
    """Prepare to append to `path`; returns the `index` of every usable record that it holds already.

    A half-written last line is cut off. UsageError if the file was made by something else; with `overwrite` a file that
    `append` has written is replaced.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder")
    if path.exists() and not overwrite:
        made_by = read_about(path)
        if made_by != about:
            instead = ", or replace it with --overwrite" if made_by else ""
            by = "with other settings" if made_by else "by something else"
            raise UsageError(f"{path} was made {by}: choose another file{instead}")
        _try(path, lambda: _end_last_line(path))
        return {record["index"] for record in usable(read(path)[0])}
    ownership.check([path, about_path(path)], instead="choose another file")
    _try(path, lambda: (path.parent.mkdir(parents=True, exist_ok=True), path.unlink(missing_ok=True)))
    write_json(about_path(path), about)
    append(path, [])
    return set()


def _end_last_line(path: Path) -> None:
    """Cut off a half-written last line; end a whole one that lacks its line break. OSError if the disk refuses."""
    content = read_bytes(path)
    whole, last = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
    if not last:
        return
    try:
        strict_json.loads(last)
    except ValueError:
        os.truncate(path, len(whole))
    else:
        with path.open("ab") as file:
            file.write(b"\n")


def append(path: Path, records: Iterable[dict]) -> None:
    """Append records, one per line, and flush them to the disk.

    The file's new content is listed as ours, unless somebody has changed the file. This is done record by record, so
    that a kill between two of them leaves a file that is listed.
    """
    for line in [json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records] or [b""]:
        _try(path, partial(_append_line, path, line))


def _append_line(path: Path, line: bytes) -> None:
    before = read_bytes(path) if path.exists() else b""
    if not path.exists() or ownership.is_ours(path):
        ownership.announce(path.parent, {path.name: ownership.sha256(before + line)})
    with path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _try(path: Path, action: Callable):
    try:
        return action()
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
