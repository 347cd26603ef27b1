"""A cache on disk for tensors that take long to compute.

Damaged files and files of something else are detected and computed again.
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
            path.unlink()  # whoever waits for it opens a new one and checks again
        lock.release()
