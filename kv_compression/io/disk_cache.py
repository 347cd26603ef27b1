"""Tensors that are expensive to make, kept on disk by what they were made from.

A file that is damaged, or not of this cache, is told from a good one and made again.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock
from torch import Tensor

from kv_compression.io.tensor_files import canonical, digest, read_tensors, write_tensors

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The project's folder among the user's caches; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kv_compression"


def cached_tensors(kind: str, key: dict, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `compute` returns, on the CPU; it is called once for every `kind` and `key`, over all processes to come.

    One process that computes is waited for by others. `key` is whatever JSON holds, and must name all that decides the
    result. Where the disk refuses, the tensors are just not kept.
    """
    path = cache_folder() / kind / f"{digest(canonical(key))}.safetensors"
    found = _read(path, key)
    if found is not None:
        return found
    with _alone(path.with_suffix(".lock")):
        found = _read(path, key)  # another process may have made it meanwhile
        if found is not None:
            return found
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in compute().items()}
        try:
            write_tensors(path, tensors, key)
        except OSError as error:
            log.warning("%s is not kept for the next run: %s", path, error.strerror or error)
        return tensors


def _read(path: Path, key: dict) -> dict[str, Tensor] | None:
    """The tensors of a good file that was made for `key`, else None."""
    found = read_tensors(path)
    return found[0] if found is not None and canonical(found[1]) == canonical(key) else None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes out while this one works, as far as the file system has locks."""
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
            path.unlink()  # who waits for it opens another, and looks again
        lock.release()
