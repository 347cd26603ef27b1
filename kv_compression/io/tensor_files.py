"""Files of tensors that are written whole or not at all, and known for damaged if they are.

safetensors, with a note in JSON and a hash of all content among the metadata. Knows files and hashes; what the tensors
mean is the caller's business.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from kv_compression.io import strict_json
from kv_compression.io.ownership import write_whole


def digest(*parts: bytes | str | Tensor) -> str:
    """SHA-256 over the parts and where each of them ends; a tensor's dtype and shape count as well as its content."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            kind = f"{part.dtype}{tuple(part.shape)}"
            flat = part.detach().cpu().contiguous().flatten()
            # A single element may keep any stride, but bytes are seen through a stride of 1 only.
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
    """`write` a file of tensors. OSError if the disk refuses.

    `note` is whatever JSON holds.
    """
    text = canonical(note)
    write(path, safetensors.torch.save(tensors, {"note": text, "content": _digest_of(tensors, text)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], object] | None:
    """The tensors and the note that `write_tensors` left in a file; None if there is none or anything is wrong."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        note = strict_json.loads(metadata.get("note", "").encode())
    except (OSError, safetensors.SafetensorError, ValueError):
        return None
    return (tensors, note) if metadata.get("content") == _digest_of(tensors, metadata["note"]) else None


def canonical(note) -> str:
    """The JSON of a note, the same for equal notes."""
    return json.dumps(note, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest_of(tensors: dict[str, Tensor], note: str) -> str:
    return digest(note, *(part for name in sorted(tensors) for part in (name, tensors[name])))
