"""Files of tensors that are written whole or not at all, and detected if they are damaged.

They are safetensors files with a JSON note and a hash of all content in their metadata.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from filelock import FileLock
from torch import Tensor

from kv_compression.io import strict_json
from kv_compression.io.ownership import write_whole


def digest(*parts: bytes | str | Tensor) -> str:
    """SHA-256 of the parts and of where each ends; for a tensor, also of its dtype and shape."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            kind = f"{part.dtype}{tuple(part.shape)}"
            flat = part.detach().cpu().contiguous().flatten()
            # A single element may have any stride, but a view as bytes needs a stride of 1.
            content = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy()
        else:
            kind = type(part).__name__
            content = part.encode() if isinstance(part, str) else part
        sha.update(f"{kind}:{len(content)}:".encode())
        sha.update(content)
    return sha.hexdigest()


def write_tensors(
    path: Path, tensors: dict[str, Tensor], note, write: Callable[[Path, bytes], None] = write_whole
) -> None:
    """Write a file of tensors with a note, any JSON value. OSError if the disk refuses."""
    text = canonical(note)
    write(path, safetensors.torch.save(tensors, {"note": text, "content": _digest_of(tensors, text)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], object] | None:
    """The tensors and the note in a file of `write_tensors`; None if there is no file or it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        note = strict_json.loads(metadata.get("note", "").encode())
    except (OSError, safetensors.SafetensorError, ValueError):
        return None
    return (tensors, note) if metadata.get("content") == _digest_of(tensors, metadata["note"]) else None


def canonical(note) -> str:
    """A note as JSON, the same text for equal notes."""
    return json.dumps(note, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest_of(tensors: dict[str, Tensor], note: str) -> str:
    return digest(note, *(part for name in sorted(tensors) for part in (name, tensors[name])))


log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The project's folder in the user's cache folder; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kv_compression"


def cached_tensors(kind: str, key: dict, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The result of `compute`, on the CPU; it is called once for each `kind` and `key`, across all processes and runs.

    While one process computes, others wait. `key` is a JSON value that names everything the result depends on. If the
    disk refuses, the tensors are not kept.
    """
    path = cache_folder() / kind / f"{digest(canonical(key))}.safetensors"
    found = _read(path, key)
    if found is not None:
        return found
    with _alone(path.with_suffix(".lock")):
        found = _read(path, key)  # another process may have written it in the meantime
        if found is not None:
            return found
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in compute().items()}
        try:
            write_tensors(path, tensors, key)
        except OSError as error:
            log.warning("%s could not be kept for the next run: %s", path, error.strerror or error)
        return tensors


def _read(path: Path, key: dict) -> dict[str, Tensor] | None:
    """The tensors of an intact file for `key`, else None."""
    found = read_tensors(path)
    return found[0] if found is not None and canonical(found[1]) == canonical(key) else None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes out while this one works, if the file system has locks."""
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        log.debug("%s cannot be locked: %s", path, error)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # a process that waits for it opens a new one and checks again
        lock.release()
