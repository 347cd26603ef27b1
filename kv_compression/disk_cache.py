"""Tensors that are expensive to make, kept on disk by what they were made from.

Knows files and hashes; what the tensors mean is the caller's business. A file holds its key and a hash of its content,
so that one that is damaged, or not of this cache, is told from a good one and made again.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The project's folder among the user's caches; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kv_compression"


def cached_tensors(kind: str, key: dict, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `compute` returns, on the CPU; it is called once for every `kind` and `key`, over all processes to come.

    `key` is whatever JSON holds, and must name all that decides the result. Where the disk refuses, the tensors are
    just not kept.
    """
    canonical = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    path = cache_folder() / kind / f"{digest(canonical)}.safetensors"
    tensors = _read(path, canonical)
    if tensors is None:
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in compute().items()}
        _write(path, canonical, tensors)
    return tensors


def digest(*parts: bytes | str | Tensor) -> str:
    """SHA-256 over the parts and where each of them ends; a tensor's dtype and shape count as well as its content."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            kind = f"{part.dtype}{tuple(part.shape)}"
            content = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        else:
            kind = type(part).__name__
            content = part.encode() if isinstance(part, str) else part
        sha.update(f"{kind}:{len(content)}:".encode())
        sha.update(content)
    return sha.hexdigest()


def _digest_of(tensors: dict[str, Tensor]) -> str:
    return digest(*(part for name in sorted(tensors) for part in (name, tensors[name])))


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors that `_write` left in a file, None if there is no such file or anything about it is wrong."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, safetensors.SafetensorError):
        return None
    return tensors if metadata == {"key": key, "content": _digest_of(tensors)} else None


def _write(path: Path, key: str, tensors: dict[str, Tensor]) -> None:
    """Write a file beside `path` and rename it there: no reader sees half of it."""
    content = safetensors.torch.save(tensors, {"key": key, "content": _digest_of(tensors)})
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            partial = file.name
            file.write(content)
        os.replace(partial, path)
    except OSError as error:
        log.warning("%s is not kept for the next run: %s", path, error.strerror or error)
    finally:
        if partial and os.path.exists(partial):
            os.unlink(partial)
