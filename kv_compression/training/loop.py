"""LoRA fine-tuning under a method's mask, on accelerate.

Knows how adapters are attached and how the loop steps. Every step is a pure function of the settings and the step's
number: the order of blocks, their spans and all draws come from the seed, nothing from what ran before or from how many
processes share the work. (Dropout that a model has of its own, as OPT does, is torch's: it goes on where it was.)
"""

import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import peft
import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from kv_compression.data.blocks import Blocks
from kv_compression.io.errors import Interrupted, RunError, UsageError
from kv_compression.io.fields import is_number
from kv_compression.methods.full_attention import TextOnly
from kv_compression.methods.sentinels import IGNORED
from kv_compression.model.attention import Patch
from kv_compression.model.loss import TokenLosses
from kv_compression.model.parts import decoder_of
from kv_compression.settings import Settings
from kv_compression.training.checkpoints import Checkpoint, Checkpoints

log = logging.getLogger(__name__)
EPOCHS_APART = 1_000_003  # an epoch's seed is no other run's in another epoch

OPTIMIZER = {"name": "AdamW", "betas": [0.9, 0.999], "eps": 1e-8}
SAME_SIGNAL = 3.0  # seconds


@dataclass
class Prepared:
    """A model with adapters, ready to be scored and trained by however many processes there are.

    `token_losses` is a `TokenLosses` of `model` as accelerate has wrapped it: it is what has to be called.
    """

    model: peft.PeftModel
    token_losses: nn.Module
    optimizer: torch.optim.Optimizer


def prepare(model: peft.PeftModel, accelerator, settings: Settings) -> Prepared:
    """Hand the model of `add_lora` and an AdamW for its adapters over to accelerate, which may spread both.

    With `settings.gradient_checkpointing` a layer's activations are computed again where they are needed, with
    `settings.compile` layers are compiled. UsageError for distillation under FSDP. (Paper, section 4.1, for the
    optimizer.)
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    recipe = {name: value for name, value in OPTIMIZER.items() if name != "name"}
    if settings.sentinel_learning_rate is not None:
        rows = [value for name, value in model.named_parameters() if value.requires_grad and "trainable_tokens" in name]
        others = [value for value in parameters if not any(value is row for row in rows)]
        parameters = [{"params": others}, {"params": rows, "lr": settings.sentinel_learning_rate}]
    rates = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    optimizer = torch.optim.AdamW(parameters, fused=True, **rates, **recipe)
    if settings.gradient_checkpointing:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    token_losses = TokenLosses(model)
    if settings.compile:
        for layer in token_losses.layers():
            layer.compile(dynamic=True)  # blocks with sentinels are of many lengths
    if accelerator.is_fsdp2 and settings.distill_weight:
        raise UsageError("--distill_weight needs the whole model in every process: it does not go with FSDP")
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.mixed_precision_policy is not None:
        plugin = accelerator.state.fsdp_plugin  # bf16 is too coarse for losses and for sums over processes
        exact = {"output_dtype": None, "reduce_dtype": torch.float32}
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, **exact)
    token_losses, optimizer = accelerator.prepare(token_losses, optimizer)
    return Prepared(model, token_losses, optimizer)


@dataclass
class TrainingReport:
    """What the loop did: `loss` is the mean over the last tenth of the steps, in nats per token.

    The learning rate's scheduler was made for `scheduler_steps`, `scheduler_warmup_steps` of them warm-up, and stepped
    once per optimizer step; `last_learning_rate` is that of the last optimizer step.
    """

    steps: int
    tokens: int
    seconds: float
    loss: float
    scheduler_steps: int
    scheduler_warmup_steps: int
    last_learning_rate: float

    @property
    def tokens_per_second(self) -> float:
        """Text tokens trained on per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Schedule:
    """Which blocks every optimizer step reads: epochs of shuffled blocks, in micro-batches, as the paper trains."""

    def __init__(self, settings: Settings, num_blocks: int, num_processes: int):
        self.settings = settings
        self.num_blocks = num_blocks
        self.per_micro_batch = settings.per_device_train_batch_size * num_processes
        self.per_step = self.per_micro_batch * settings.gradient_accumulation_steps
        self.steps_per_epoch = math.ceil(num_blocks / self.per_step)
        self.num_steps = settings.max_train_steps or settings.num_train_epochs * self.steps_per_epoch
        # The published scripts count micro-batches here, although their scheduler steps once per optimizer step.
        counted = settings.gradient_accumulation_steps if settings.published_schedule else 1
        self.scheduler_steps = self.num_steps * counted
        self.scheduler_warmup_steps = settings.num_warmup_steps * counted

    def epoch_of(self, step: int) -> int:
        """The epoch that a step (from 0) belongs to."""
        return step // self.steps_per_epoch

    def blocks_of(self, step: int) -> list[int]:
        """The indices of the blocks that all processes read in a step; an epoch's last step may have fewer."""
        order = _shuffled(self.num_blocks, self.settings.seed, self.epoch_of(step))
        first = step % self.steps_per_epoch * self.per_step
        return order[first : first + self.per_step]

    def micro_batches(self, blocks: list[int]) -> list[list[int]]:
        """A step's blocks, in the order given, as micro-batches of all processes."""
        return [blocks[start : start + self.per_micro_batch] for start in range(0, len(blocks), self.per_micro_batch)]

    def share(self, micro_batch: list[int], process: int) -> list[int]:
        """What one process reads of a micro-batch; nothing, where it is a small one."""
        size = self.settings.per_device_train_batch_size
        return micro_batch[process * size : (process + 1) * size]


@lru_cache(maxsize=4)
def _shuffled(num_blocks: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch reads its blocks."""
    generator = torch.Generator().manual_seed(seed * EPOCHS_APART + epoch)
    return torch.randperm(num_blocks, generator=generator).tolist()


class MicroBatch(NamedTuple):
    """What a process reads at once: `inputs` of `blocks`, and the number of targets that all processes read."""

    inputs: dict[str, torch.Tensor]
    blocks: list[int]
    num_targets: int


class StepData(torch.utils.data.Dataset):
    """Item i holds the micro-batches of step i: a map-style view for torch's DataLoader."""

    def __init__(self, blocks: Blocks, schedule: Schedule, process: int, fixed_spans: bool):
        self.blocks, self.schedule, self.process, self.fixed_spans = blocks, schedule, process, fixed_spans

    def __len__(self) -> int:
        return self.schedule.num_steps

    def __getitem__(self, step: int) -> list[MicroBatch]:
        self.blocks.epoch = 0 if self.fixed_spans else self.schedule.epoch_of(step)
        drawn = {index: self.blocks[index] for index in self.schedule.blocks_of(step)}
        by_length = sorted(drawn, key=lambda index: len(drawn[index]))  # blocks of like length pad each other least
        return [self._micro_batch(everyone, drawn) for everyone in self.schedule.micro_batches(by_length)]

    def _micro_batch(self, everyone: list[int], drawn: dict[int, list[int]]) -> MicroBatch:
        own = self.schedule.share(everyone, self.process)
        read = own or everyone[-1:]  # a process without a block of its own still has to keep in step
        inputs = self.blocks.batch(read, drawn)
        if not own:
            inputs["labels"].fill_(IGNORED)
        return MicroBatch(inputs, read, sum(map(self.blocks.num_targets, everyone)))


def train(
    prepared: Prepared,
    blocks: Blocks,
    patch: Patch,
    accelerator,
    settings: Settings,
    writer,
    checkpoints: Checkpoints | None = None,
    resume: Checkpoint | None = None,
) -> TrainingReport:
    """Fine-tune the adapters of a patched model with settings' schedule and batches.

    `writer` is a `scalars.Scalars` or None. With `checkpoints` the run can go on from one of them, `resume`,
    as if it had never been broken off; SIGINT and SIGTERM then write one, and raise Interrupted. RunError at the first
    loss that is not finite, naming the step and its blocks. (Paper, section 4.1.)
    """
    model, token_losses, optimizer = prepared.model, prepared.token_losses, prepared.optimizer
    schedule = Schedule(settings, len(blocks), accelerator.num_processes)
    scheduler = transformers.get_scheduler(
        settings.lr_scheduler_type,
        optimizer.optimizer,
        num_warmup_steps=schedule.scheduler_warmup_steps,
        num_training_steps=schedule.scheduler_steps,
    )
    rule, on_gpu = patch.rule, accelerator.device.type == "cuda"
    data = StepData(blocks, schedule, accelerator.process_index, settings.fixed_spans)
    done = resume.step if resume else 0
    to_read = Subset(data, range(done, schedule.num_steps))
    steps = iter(DataLoader(to_read, batch_size=None, shuffle=False, pin_memory=on_gpu))
    progress = Progress(schedule, writer, ahead=1 if on_gpu else 0)
    if resume is not None:  # behind iter(), which draws a random number
        progress.begin(*restore(resume, model, optimizer, scheduler, schedule.num_steps))
        progress.rate = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](done - 1)  # nothing may be left to do
    token_losses.train()
    try:
        with (
            tqdm(
                total=schedule.num_steps, initial=done, desc="training", disable=not accelerator.is_main_process
            ) as bar,
            signals_noted(checkpoints is not None) as signals,
        ):
            progress.bar = bar
            for step, micro_batches in enumerate(steps, start=done):
                patch.rule = rule.with_seed(rule.seed + EPOCHS_APART * schedule.epoch_of(step))
                rate = scheduler.get_last_lr()[0]
                loss = optimizer_step(prepared, micro_batches, accelerator, scheduler, patch, settings, step)
                overdue = checkpoints is not None and accelerator.is_main_process and checkpoints.overdue()
                # Processes must agree, and their clocks do not.
                wishes = [torch.full_like(loss, float(wish)) for wish in (bool(signals), overdue)]
                results = torch.stack([loss / accelerator.num_processes, *wishes])
                progress.add(
                    accelerator.reduce(results, reduction="sum"),
                    sum(micro_batch.num_targets for micro_batch in micro_batches),
                    rate,
                )
                last = step + 1 == schedule.num_steps
                due = checkpoints is not None and checkpoints.due_at(step + 1) and not last
                if due or last:
                    progress.read()
                if due or progress.end_wanted or (progress.checkpoint_wanted and not last):
                    progress.read()
                    so_far = (progress.tokens, progress.losses, progress.seconds)
                    checkpoint = capture(model, optimizer, scheduler, *so_far)
                    if accelerator.is_main_process:
                        checkpoints.write(step + 1, *checkpoint)
                    progress.checkpoint_wanted = False
                if progress.end_wanted:
                    raise Interrupted(
                        f"interrupted after step {step + 1} of {schedule.num_steps}: the same command with "
                        "--resume_from_checkpoint goes on"
                    )
    finally:
        patch.rule = rule
        model.draws.table = None
    return progress.report()


class Progress:
    """What a run has done so far, told to the log, the bar and the `writer` (`scalars.Scalars`, or None).

    Reading a number waits for the device, so a step's results are read when `ahead` later ones are on their way. They
    are three numbers: the loss, and by how many processes an end and a checkpoint are wanted.
    """

    def __init__(self, schedule: Schedule, writer, ahead: int):
        self.schedule, self.writer, self.ahead = schedule, writer, ahead
        self.bar = None
        self.tokens, self.losses, self.rate = 0, [], 0.0
        self.end_wanted = self.checkpoint_wanted = False
        self._start = time.perf_counter()
        self._unread: deque[tuple[torch.Tensor, torch.cuda.Event | None, int, float]] = deque()

    def begin(self, tokens: int, losses: list[float], seconds: float) -> None:
        """Go on from what a checkpoint tells."""
        self.tokens, self.losses, self._start = tokens, losses, time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Seconds spent training, those before a checkpoint among them."""
        return time.perf_counter() - self._start

    def add(self, results: torch.Tensor, tokens: int, rate: float) -> None:
        """Take a step's results `(3,)`, its targets and its learning rate, and read what is due."""
        arrived = None
        if results.is_cuda:  # reading them later must wait for their own step, not for those behind it
            results, arrived = results.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        self._unread.append((results, arrived, tokens, rate))
        self.read(self.ahead)

    def read(self, but: int = 0) -> None:
        """Read the results of all steps but the last so many. RunError at a loss that is not finite."""
        while len(self._unread) > but:
            results, arrived, tokens, rate = self._unread.popleft()
            if arrived is not None:
                arrived.synchronize()
            loss, ends, checkpoints = results.tolist()
            step = len(self.losses) + 1
            if not math.isfinite(loss):
                blocks = self.schedule.blocks_of(step - 1)
                raise RunError(f"the loss is {loss} at step {step}, blocks {blocks}: lower --learning_rate")
            self.end_wanted |= ends > 0
            self.checkpoint_wanted |= checkpoints > 0
            self.losses.append(loss)
            self.tokens += tokens
            self.rate = rate
            self._tell(step, loss, rate)

    def _tell(self, step: int, loss: float, rate: float) -> None:
        speed = self.tokens / self.seconds
        log.info("step %d/%d loss %.6f tokens/s %.0f", step, self.schedule.num_steps, loss, speed)
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{speed:.0f}")
        if self.writer is not None:
            self.writer.add("train/loss", loss, step)
            self.writer.add("train/learning_rate", rate, step)
            self.writer.add("train/tokens_per_second", speed, step)

    def report(self) -> TrainingReport:
        """What was done in all."""
        tail = self.losses[-max(len(self.losses) // 10, 1) :]
        rates = (self.schedule.scheduler_steps, self.schedule.scheduler_warmup_steps, self.rate)
        return TrainingReport(len(self.losses), self.tokens, self.seconds, sum(tail) / len(tail), *rates)


@contextmanager
def signals_noted(wanted: bool) -> Iterator[list[float]]:
    """Let SIGINT and SIGTERM be noted (when they came) in a list instead of ending the process.

    A later one ends it as before; what comes within seconds is the same one, which a terminal and a launcher both send.
    """
    noted: list[float] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        if noted and time.monotonic() - noted[0] > SAME_SIGNAL:
            for each, handler in before.items():
                signal.signal(each, handler)
            signal.raise_signal(number)
        noted.append(time.monotonic())

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def capture(model: nn.Module, optimizer, scheduler, tokens: int, losses: list[float], seconds: float) -> tuple:
    """All that the next step depends on, as tensors by name and a state that JSON holds. Every process must ask."""
    tensors = {f"model.{name}": value for name, value in trained(model).items()}
    for index, values in optimizer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": whole(value) for name, value in values.items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    schedule = {name: value for name, value in scheduler.state_dict().items() if name != "lr_lambdas"}
    return tensors, {"tokens": tokens, "seconds": seconds, "scheduler": schedule}


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that is trained, by name. Where processes hold a part each, all of them must ask."""
    return {name: whole(value) for name, value in model.named_parameters() if value.requires_grad}


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor with the parts that other processes hold."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part_of(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this process holds of a whole tensor, if `like` is held in parts."""
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer, scheduler, num_steps: int) -> tuple:
    """Put everything back where `capture` found it; returns tokens, losses and seconds so far.

    RunError, with nothing changed, if the checkpoint is not of such a model, or of a run of `num_steps`.
    """
    wrong = _mismatch(checkpoint, model, optimizer, scheduler, num_steps)
    if wrong:
        raise RunError(
            f"the checkpoint of step {checkpoint.step} is not of this run ({wrong}): --overwrite starts again"
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
            if value.shape == parameter.shape:  # else it counts steps
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
    """What of a checkpoint cannot be of a run that is set up like this one, "" if there is nothing."""
    step, state, found = checkpoint.step, checkpoint.state, dict(checkpoint.tensors)
    if not 0 < step <= num_steps:
        return f"a run has {num_steps} steps"
    expected, of_start = capture(model, optimizer, scheduler, 0, [], 0.0)
    expected["losses"] = torch.zeros(step, dtype=torch.float64)
    for index, value in enumerate(value for group in optimizer.param_groups for value in group["params"]):
        if f"optimizer.{index}.step" in found:  # else it never had a gradient
            parts = {"step": torch.zeros(()), "exp_avg": value, "exp_avg_sq": value}
            expected |= {f"optimizer.{index}.{part}": value for part, value in parts.items()}
    if "random.cuda" not in expected.keys() & found.keys():  # a run may go on with another device
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
    told = _built_alike(state, of_start) and state["scheduler"]["last_epoch"] == step
    return "" if told and min(state["seconds"], state["tokens"]) >= 0 else "its state"


def _built_alike(one, other) -> bool:
    """Whether two values of JSON are the same but for their numbers."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_built_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_built_alike, one, other))
    return one == other or (is_number(one) and is_number(other))


@dataclass
class Teacher:
    """The same model without its adapters under full attention, to be learnt from with some `weight`."""

    model: nn.Module
    patch: Patch
    weight: float

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor]) -> dict:
        """What `TokenLosses` takes of a teacher, for the inputs of a batch."""
        rule = self.patch.rule
        documents = {"isolate_documents": rule.isolate_documents}
        documents["position_ids_by_document"] = rule.position_ids_by_document
        self.patch.rule = TextOnly(cl_id=rule.cl_id, cr_id=rule.cr_id, **documents)
        self.model.eval()
        try:
            with self.model.disable_adapter():
                states = decoder_of(self.model)(**batch, use_cache=False).last_hidden_state
        finally:
            self.model.train()
            self.patch.rule = rule
        return {"teacher": states, "distill_weight": self.weight}


def optimizer_step(
    prepared: Prepared,
    micro_batches: list[MicroBatch],
    accelerator,
    scheduler,
    patch: Patch,
    settings: Settings,
    step: int,
) -> torch.Tensor:
    """One optimizer step; returns its loss in nats per token, a scalar whose mean over processes counts."""
    token_losses, optimizer, draws = prepared.token_losses, prepared.optimizer, prepared.model.draws
    teach = Teacher(prepared.model, patch, settings.distill_weight) if settings.distill_weight else None
    total = 0.0
    for number, (inputs, blocks, num_targets) in enumerate(micro_batches):
        batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in inputs.items()}
        labels = batch.pop("labels")
        draws.draw(settings.seed, step, blocks, labels.shape[1], accelerator.device)
        last = number == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(token_losses):  # processes exchange gradients once a step
            with accelerator.autocast():
                taught = teach(batch) if teach else {}
                loss = token_losses(labels, **taught, **batch).sum()
            loss = loss / (max(num_targets, 1) / accelerator.num_processes)  # processes then take the mean
            accelerator.backward(loss / len(micro_batches))
        total = total + loss.detach()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return total / len(micro_batches)
