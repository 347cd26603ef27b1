"""Checkpoints of a training run: written whole or not at all, hashed, the newest few kept.

Knows files, steps and minutes; what is in a checkpoint is `training`'s business.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from kv_compression.io import ownership
from kv_compression.io.errors import RunError, UsageError
from kv_compression.io.fields import Fields, is_count, is_object, wrong
from kv_compression.io.tensor_files import read_tensors, write_tensors

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
OF_A_CHECKPOINT: Fields = {"step": is_count, "identity": is_object, "state": is_object}


@dataclass(frozen=True)
class Checkpoint:
    """What a run was after so many steps: tensors by name, and a state that JSON holds."""

    step: int
    tensors: dict[str, Tensor]
    state: dict


@dataclass
class Checkpoints:
    """The checkpoints of the run in `folder` whose settings are `identity`, one every so many `steps` or `minutes`.

    A setting that a checkpoint of an older version does not name had its value in `defaults`.
    """

    folder: Path
    identity: dict
    steps: int | None = None
    minutes: float | None = None
    keep: int = 2
    defaults: dict = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)

    def due_at(self, step: int) -> bool:
        """Whether one is to be written behind this step (from 1), by the count of steps."""
        return self.steps is not None and step % self.steps == 0

    def overdue(self) -> bool:
        """Whether one is to be written now, by the clock."""
        return self.minutes is not None and time.monotonic() - self._last >= 60 * self.minutes

    def write(self, step: int, tensors: dict[str, Tensor], state: dict) -> Path:
        """Write one and let old ones go. RunError if the disk refuses; those that are there stay."""
        path = self.folder / FOLDER / f"step_{step:08d}.safetensors"
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        note = {"step": step, "identity": self.identity, "state": state}
        write = partial(ownership.write, folder=self.folder, holds=ownership.ANYTHING)
        try:
            self._remove(ownership.is_partial)
            write_tensors(path, tensors, note, write)
            self._last = time.monotonic()
            old = {f"{FOLDER}/{path.name}" for path in self._paths()[self.keep :]}
            self._remove(old.__contains__)
        except OSError as error:
            good = self.newest_step()
            there = f"the last good one is of step {good}" if good else "there is none before it"
            raise RunError(f"cannot write the checkpoint {path}: {error.strerror or error}; {there}") from error
        return path

    def read(self, step: int | None = None) -> Checkpoint | None:
        """The newest good one, or that of `step`, None if there is none.

        A damaged one is named in the log and the one before it taken. UsageError if it is of other settings.
        """
        for path in self._paths():
            if step is not None and path.name != f"step_{step:08d}.safetensors":
                continue
            tensors, note = read_tensors(path) or ({}, None)
            if not is_object(note) or wrong(note, OF_A_CHECKPOINT):
                log.warning("the checkpoint %s is damaged: looking for the one before it", path)
                print(f"the checkpoint {path} is damaged: looking for the one before it", flush=True)
                continue
            identity = self.defaults | note["identity"]
            changed = [name for name in identity | self.identity if identity.get(name) != self.identity.get(name)]
            if changed:
                raise UsageError(
                    f"{path} is of other settings ({', '.join(changed[:3])}): choose another --output_dir, or start "
                    "again with --overwrite"
                )
            return Checkpoint(note["step"], tensors, note["state"])
        return None

    def newest_step(self) -> int | None:
        """The step of the newest file, good or not, None if there is none."""
        paths = self._paths()
        return int(paths[0].stem.removeprefix("step_")) if paths else None

    def clear(self) -> None:
        """Let all of them go. OSError if the disk refuses."""
        self._remove(lambda name: True)

    def _remove(self, which: Callable[[str], bool]) -> None:
        """Remove what `write` has written, whole or not, as far as it is `which`."""
        ownership.remove(self.folder, lambda name: name.startswith(f"{FOLDER}/") and which(name))

    def _paths(self) -> list[Path]:
        """The files, newest first; whatever else lies there is not looked at."""
        found = (self.folder / FOLDER).glob("step_????????.safetensors")
        return sorted((path for path in found if path.stem.removeprefix("step_").isdecimal()), reverse=True)
