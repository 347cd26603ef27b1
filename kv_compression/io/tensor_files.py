"""Files of tensors that are written whole or not at all, and detected if they are damaged.

They are safetensors files with a JSON note and a hash of all content in their metadata.
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
