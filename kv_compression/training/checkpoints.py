"""Checkpoints of a training run: what is in them, and the files.

A file is written whole or not at all and carries a hash of its content; the newest few are kept.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kv_compression.io import ownership
from kv_compression.io.errors import RunError, UsageError
from kv_compression.io.fields import Fields, is_count, is_number, is_object, wrong
from kv_compression.io.tensor_files import read_tensors, write_tensors

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
OF_A_CHECKPOINT: Fields = {"step": is_count, "identity": is_object, "state": is_object}


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` steps: tensors by name, and a `state` that JSON holds."""

    step: int
    tensors: dict[str, Tensor]
    state: dict


@dataclass
class Checkpoints:
    """The checkpoints of the run in `folder` with the settings `identity`, one every so many `steps` or `minutes`.

    A setting that a checkpoint of an older version does not have counts as its value in `defaults`.
    """

    folder: Path
    identity: dict
    steps: int | None = None
    minutes: float | None = None
    keep: int = 2
    defaults: dict = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)

    def due_at(self, step: int) -> bool:
        """Whether to write one after this step (from 1), by the number of steps."""
        return self.steps is not None and step % self.steps == 0

    def overdue(self) -> bool:
        """Whether to write one now, by the clock."""
        return self.minutes is not None and time.monotonic() - self._last >= 60 * self.minutes

    def write(self, step: int, tensors: dict[str, Tensor], state: dict) -> Path:
        """Write one and remove old ones. RunError if the disk refuses; existing ones then stay."""
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
            left = f"the last good one is of step {good}" if good else "there is no earlier one"
            raise RunError(f"cannot write the checkpoint {path}: {error.strerror or error}; {left}") from error
        return path

    def read(self, step: int | None = None) -> Checkpoint | None:
        """The newest intact checkpoint, or the one of `step`; None if there is none.

        A damaged one is reported, and the one before it is tried. UsageError if it belongs to other settings.
        """
        for path in self._paths():
            if step is not None and path.name != f"step_{step:08d}.safetensors":
                continue
            tensors, note = read_tensors(path) or ({}, None)
            if not is_object(note) or wrong(note, OF_A_CHECKPOINT):
                message = f"the checkpoint {path} is damaged: looking for the one before it"
                log.warning("%s", message)
                print(message, flush=True)
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
        """The step of the newest file, intact or not; None if there is none."""
        paths = self._paths()
        return int(paths[0].stem.removeprefix("step_")) if paths else None

    def clear(self) -> None:
        """Remove all of them. OSError if the disk refuses."""
        self._remove(lambda name: True)

    def _remove(self, which: Callable[[str], bool]) -> None:
        """Remove the files that `write` has written, whole or not, if they are `which`."""
        ownership.remove(self.folder, lambda name: name.startswith(f"{FOLDER}/") and which(name))

    def _paths(self) -> list[Path]:
        """The files, newest first; any other files are ignored."""
        found = (self.folder / FOLDER).glob("step_????????.safetensors")
        return sorted((path for path in found if path.stem.removeprefix("step_").isdecimal()), reverse=True)


def capture(
    model: nn.Module, optimizer, scheduler, tokens: int, losses: list[float], seconds: float
) -> tuple[dict[str, Tensor], dict]:
    """Everything that the next step depends on, as `Checkpoints.write` takes it. All processes must call it."""
    tensors = {f"model.{name}": value for name, value in trained(model).items()}
    for index, values in optimizer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": whole(value) for name, value in values.items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    schedule = {name: value for name, value in scheduler.state_dict().items() if name != "lr_lambdas"}
    return tensors, {"tokens": tokens, "seconds": seconds, "scheduler": schedule}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """All trained parameters by name. All processes must call it: each may hold only a part."""
    return {name: whole(value) for name, value in model.named_parameters() if value.requires_grad}


def whole(value: Tensor) -> Tensor:
    """A tensor with the parts that other processes hold."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, if `like` is split over processes."""
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer, scheduler, num_steps: int
) -> tuple[int, list[float], float]:
    """Undo `capture`: load everything back, and return tokens, losses and seconds so far.

    RunError, with nothing changed, if the checkpoint does not fit the model, or a run of `num_steps`.
    """
    mismatch = _mismatch(checkpoint, model, optimizer, scheduler, num_steps)
    if mismatch:
        raise RunError(
            f"the checkpoint of step {checkpoint.step} is not of this run ({mismatch}): --overwrite starts again"
        )
    tensors, state = checkpoint.tensors, checkpoint.state
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.copy_(part_of(tensors[f"model.{name}"].to(value.device), value))
    parameters = [value for group in optimizer.optimizer.param_groups for value in group["params"]]
    optimizer_state = optimizer.optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, part = name.split(".")
            parameter = parameters[int(index)]
            if value.shape == parameter.shape:  # otherwise it is the count of steps
                value = part_of(value.to(parameter.device), parameter)
            optimizer_state["state"].setdefault(int(index), {})[part] = value
    optimizer.optimizer.load_state_dict(optimizer_state)
    scheduler.load_state_dict(scheduler.state_dict() | state["scheduler"])
    for group, rate in zip(optimizer.optimizer.param_groups, state["scheduler"]["_last_lr"]):
        group["lr"] = rate
    torch.set_rng_state(tensors["random"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return state["tokens"], tensors["losses"].tolist(), state["seconds"]


def _mismatch(checkpoint: Checkpoint, model: nn.Module, optimizer, scheduler, num_steps: int) -> str:
    """The part of a checkpoint that cannot belong to a run set up like this one; "" if everything fits."""
    step, state, found = checkpoint.step, checkpoint.state, dict(checkpoint.tensors)
    if not 0 < step <= num_steps:
        return f"a run has {num_steps} steps"
    expected, fresh_state = capture(model, optimizer, scheduler, 0, [], 0.0)
    expected["losses"] = torch.zeros(step, dtype=torch.float64)
    for index, value in enumerate(value for group in optimizer.param_groups for value in group["params"]):
        if f"optimizer.{index}.step" in found:  # otherwise it never had a gradient
            parts = {"step": torch.zeros(()), "exp_avg": value, "exp_avg_sq": value}
            expected |= {f"optimizer.{index}.{part}": value for part, value in parts.items()}
    if "random.cuda" not in expected.keys() & found.keys():  # a run may resume on another device
        for tensors in (expected, found):
            tensors.pop("random.cuda", None)
    for name in sorted(expected.keys() | found.keys()):
        here, there = expected.get(name), found.get(name)
        if here is None or there is None or (here.dtype, here.shape) != (there.dtype, there.shape):
            return name
        if name.startswith("optimizer.") and name.endswith(".step") and not 0 < float(there) <= step:
            return name
    try:
        for name in found.keys() & {"random", "random.cuda"}:
            torch.Generator("cuda" if name == "random.cuda" else "cpu").set_state(found[name])
    except RuntimeError:
        return name
    fits = _same_but_for_numbers(state, fresh_state) and state["scheduler"]["last_epoch"] == step
    return "" if fits and min(state["seconds"], state["tokens"]) >= 0 else "its state"


def _same_but_for_numbers(one, other) -> bool:
    """Whether two JSON values differ in nothing but their numbers."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same_but_for_numbers(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same_but_for_numbers, one, other))
    return one == other or (is_number(one) and is_number(other))
