"""Tensors that are expensive to make, kept on disk by what they were made from.

A file that is damaged, or not of this cache, is told from a good one and made again.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from kv_compression.tensor_files import canonical, digest, read_tensors, write_tensors

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The project's folder among the user's caches; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kv_compression"


def cached_tensors(kind: str, key: dict, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `compute` returns, on the CPU; it is called once for every `kind` and `key`, over all processes to come.

    `key` is whatever JSON holds, and must name all that decides the result. Where the disk refuses, the tensors are
    just not kept.
    """
    path = cache_folder() / kind / f"{digest(canonical(key))}.safetensors"
    found = read_tensors(path)
    if found is not None and canonical(found[1]) == canonical(key):
        return found[0]
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in compute().items()}
    try:
        write_tensors(path, tensors, key)
    except OSError as error:
        log.warning("%s is not kept for the next run: %s", path, error.strerror or error)
    return tensors
