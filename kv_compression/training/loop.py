"""LoRA fine-tuning under a method's mask, on accelerate: the model is prepared, and optimizer steps follow each other.

A resumed run continues as if it had never stopped. The exception is dropout of a model's own, as OPT has it: it draws
from torch's generator, whatever the step.
"""

import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import peft
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from kv_compression.data.blocks import Blocks
from kv_compression.io.errors import Interrupted, RunError, UsageError
from kv_compression.methods.full_attention import TextOnly
from kv_compression.methods.rule import Rule
from kv_compression.model.architectures import decoder_of
from kv_compression.model.attention import Patch
from kv_compression.model.loss import TokenLosses
from kv_compression.settings import Settings
from kv_compression.training.checkpoints import Checkpoint, Checkpoints, capture, restore
from kv_compression.training.schedule import EPOCHS_APART, MicroBatch, Schedule, StepData

log = logging.getLogger(__name__)

OPTIMIZER = {"name": "AdamW", "betas": [0.9, 0.999], "eps": 1e-8}
SAME_SIGNAL = 3.0  # seconds


@dataclass
class Prepared:
    """A model with adapters, ready to be scored and trained by any number of processes.

    `token_losses` is the `TokenLosses` of `model`, wrapped by accelerate: call this one.
    """

    model: peft.PeftModel
    token_losses: nn.Module
    optimizer: torch.optim.Optimizer


def prepare(model: peft.PeftModel, accelerator, settings: Settings) -> Prepared:
    """Hand the model of `add_lora` and an AdamW for its adapters to accelerate, which may shard both.

    `settings.gradient_checkpointing` recomputes the activations of a layer when they are needed, `settings.compile`
    compiles the layers. UsageError for distillation under FSDP. (Paper, section 4.1, for the optimizer.)
    """
    if accelerator.is_fsdp2 and settings.distill_weight:
        raise UsageError("--distill_weight needs the whole model in every process: it does not go with FSDP")
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
            layer.compile(dynamic=True)  # blocks with sentinels have many lengths
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.mixed_precision_policy is not None:
        plugin = accelerator.state.fsdp_plugin  # bf16 is too coarse for losses and for sums over processes
        exact = {"output_dtype": None, "reduce_dtype": torch.float32}
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, **exact)
    token_losses, optimizer = accelerator.prepare(token_losses, optimizer)
    return Prepared(model, token_losses, optimizer)


def train(
    prepared: Prepared,
    blocks: Blocks,
    patch: Patch,
    accelerator,
    settings: Settings,
    writer,
    checkpoints: Checkpoints | None = None,
    resume: Checkpoint | None = None,
    keep_adapter: Callable[[int], None] | None = None,
) -> "TrainingReport":
    """Fine-tune the adapters of a patched model on `blocks`.

    `writer` is a `scalars.Scalars` or None. `checkpoints` are written as they fall due, and when SIGINT or SIGTERM
    comes, which then raises Interrupted; `resume` is the one to start from. `keep_adapter(step)` is called after every
    `settings.adapter_steps` steps, in all processes. RunError at the first loss that is not
    finite, naming the step and its blocks. (Paper, section 4.1.)
    """
    schedule = Schedule(settings, len(blocks), accelerator.num_processes)
    scheduler = schedule.learning_rates(prepared.optimizer.optimizer)
    rule, on_gpu = patch.rule, accelerator.device.type == "cuda"
    data = StepData(blocks, schedule, accelerator.process_index, settings.fixed_spans)
    done = resume.step if resume else 0
    to_read = Subset(data, range(done, schedule.num_steps))
    steps = iter(DataLoader(to_read, batch_size=None, shuffle=False, pin_memory=on_gpu))
    progress = Progress(schedule, writer, ahead=1 if on_gpu else 0)
    if resume is not None:  # after iter(), which draws a random number
        progress.resume(*restore(resume, prepared.model, prepared.optimizer, scheduler, schedule.num_steps))
        progress.rate = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](done - 1)  # in case no step is left
    bar = tqdm(total=schedule.num_steps, initial=done, desc="training", disable=not accelerator.is_main_process)
    prepared.token_losses.train()
    try:
        with bar as progress.bar, signals_noted(checkpoints is not None) as signals:
            for step, micro_batches in enumerate(steps, start=done):
                patch.rule = rule.with_seed(rule.seed + EPOCHS_APART * schedule.epoch_of(step))
                rate = scheduler.get_last_lr()[0]
                loss = optimizer_step(prepared, micro_batches, accelerator, scheduler, patch, settings, step)
                overdue = checkpoints is not None and accelerator.is_main_process and checkpoints.overdue()
                # Processes must agree, and their clocks do not.
                wishes = [torch.full_like(loss, float(wish)) for wish in (bool(signals), overdue)]
                results = accelerator.reduce(torch.stack([loss / accelerator.num_processes, *wishes]), reduction="sum")
                progress.add(results, sum(each.num_targets for each in micro_batches), rate)
                if keep_adapter and settings.adapter_steps and (step + 1) % settings.adapter_steps == 0:
                    keep_adapter(step + 1)
                if checkpoint_due(step + 1, schedule.num_steps, checkpoints, progress):
                    so_far = (progress.tokens, progress.losses, progress.seconds)
                    captured = capture(prepared.model, prepared.optimizer, scheduler, *so_far)
                    if accelerator.is_main_process:
                        checkpoints.write(step + 1, *captured)
                if progress.end_wanted:
                    raise Interrupted(
                        f"interrupted after step {step + 1} of {schedule.num_steps}: the same command with "
                        "--resume_from_checkpoint resumes the run"
                    )
    finally:
        patch.rule = rule
        prepared.model.draws.table = None
    return progress.report(*data.asking_shares())


def checkpoint_due(step: int, num_steps: int, checkpoints: Checkpoints | None, progress: "Progress") -> bool:
    """Whether a checkpoint is to be written after `step` (from 1); all results are then read.

    After the last step there is none to write, unless a signal asks the run to end.
    """
    last = step == num_steps
    due = checkpoints is not None and checkpoints.due_at(step) and not last
    if due or last:
        progress.read()
    due = due or progress.end_wanted or (progress.checkpoint_wanted and not last)
    if due:
        progress.read()
        progress.checkpoint_wanted = False
    return due


@dataclass
class TrainingReport:
    """What the loop did; `loss` is the mean over the last tenth of the steps, in nats per token.

    `scheduler_steps` and `scheduler_warmup_steps` are those of the `Schedule`, `last_learning_rate` is that of the last
    optimizer step. `asking_fraction` is the share of text tokens in blocks that ask for what they said,
    `answer_fraction` that of targets which are answers.
    """

    steps: int
    tokens: int
    seconds: float
    loss: float
    scheduler_steps: int
    scheduler_warmup_steps: int
    last_learning_rate: float
    asking_fraction: float
    answer_fraction: float

    @property
    def tokens_per_second(self) -> float:
        """Text tokens trained on per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Progress:
    """What a run has done so far, reported to the log, the `bar` and the `writer` (`scalars.Scalars`, or None).

    Reading a number waits for the device, so the results of a step are read when `ahead` later steps are under way.
    They are three numbers: the loss, and how many processes want to end or want a checkpoint.
    """

    def __init__(self, schedule: Schedule, writer, ahead: int):
        self.schedule, self.writer, self.ahead = schedule, writer, ahead
        self.bar = None
        self.tokens, self.losses, self.rate = 0, [], 0.0
        self.end_wanted = self.checkpoint_wanted = False
        self._start = time.perf_counter()
        self._unread: deque[tuple[Tensor, torch.cuda.Event | None, int, float]] = deque()

    def resume(self, tokens: int, losses: list[float], seconds: float) -> None:
        """Continue from the figures of a checkpoint."""
        self.tokens, self.losses, self._start = tokens, losses, time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Seconds of training, including those before a checkpoint."""
        return time.perf_counter() - self._start

    def add(self, results: Tensor, tokens: int, rate: float) -> None:
        """Take the results `(3,)`, targets and learning rate of a step, and read those that are due."""
        arrived = None
        if results.is_cuda:  # reading them later must wait for their own step, not for later ones
            results, arrived = results.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        self._unread.append((results, arrived, tokens, rate))
        self.read(self.ahead)

    def read(self, leave: int = 0) -> None:
        """Read the results of all steps but the last `leave`. RunError at a loss that is not finite."""
        while len(self._unread) > leave:
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
            self._show(step, loss, rate)

    def _show(self, step: int, loss: float, rate: float) -> None:
        speed = self.tokens / self.seconds
        log.info("step %d/%d loss %.6f tokens/s %.0f", step, self.schedule.num_steps, loss, speed)
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{speed:.0f}")
        if self.writer is not None:
            self.writer.add("train/loss", loss, step)
            self.writer.add("train/learning_rate", rate, step)
            self.writer.add("train/tokens_per_second", speed, step)

    def report(self, *asking_shares: float) -> TrainingReport:
        """The figures of the whole training."""
        tail = self.losses[-max(len(self.losses) // 10, 1) :]
        rates = (self.schedule.scheduler_steps, self.schedule.scheduler_warmup_steps, self.rate)
        return TrainingReport(
            len(self.losses), self.tokens, self.seconds, sum(tail) / len(tail), *rates, *asking_shares
        )


@contextmanager
def signals_noted(wanted: bool) -> Iterator[list[float]]:
    """Collect the times of SIGINT and SIGTERM in a list, instead of ending the process at once.

    A second signal ends it as usual, unless it comes within seconds: a terminal and a launcher both send the same one.
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


@dataclass
class Teacher:
    """The same model without its adapters under full attention, as the target of distillation with some `weight`."""

    model: nn.Module
    patch: Patch
    weight: float

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> dict:
        """The arguments of `TokenLosses` that concern a teacher, for the inputs of a batch."""
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


def drawn_ratio(rule: Rule, settings: Settings, step: int, number: int) -> Rule:
    """The rule of a micro-batch: with a ratio of its own where the settings leave a range and spans do not decide."""
    if settings.lowest_bound_ratio is None or rule.uses_sentinels:
        return rule
    rng = np.random.default_rng([settings.seed, step, number])
    return replace(rule, ratio=float(rng.uniform(settings.lowest_bound_ratio, settings.bound_ratio)))


def optimizer_step(
    prepared: Prepared,
    micro_batches: list[MicroBatch],
    accelerator,
    scheduler,
    patch: Patch,
    settings: Settings,
    step: int,
) -> Tensor:
    """One optimizer step; returns its loss in nats per token, a scalar to be averaged over processes."""
    token_losses, optimizer, draws = prepared.token_losses, prepared.optimizer, prepared.model.draws
    teach = Teacher(prepared.model, patch, settings.distill_weight) if settings.distill_weight else None
    total = 0.0
    for number, (inputs, blocks, _, weight) in enumerate(micro_batches):
        batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in inputs.items()}
        labels, weights = batch.pop("labels"), batch.pop("weights", None)
        patch.rule = drawn_ratio(patch.rule, settings, step, number)
        draws.draw(settings.seed, step, blocks, labels.shape[1], accelerator.device)
        last = number == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(token_losses):  # processes exchange gradients once a step
            with accelerator.autocast():
                taught = teach(batch) if teach else {}
                losses = token_losses(labels, **taught, **batch)
                loss = (losses if weights is None else losses * weights).sum()
            loss = loss / (max(weight, 1) / accelerator.num_processes)  # the mean over processes is taken later
            accelerator.backward(loss / len(micro_batches))
        total = total + loss.detach()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return total / len(micro_batches)
