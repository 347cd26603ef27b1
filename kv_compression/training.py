"""LoRA fine-tuning under a method's mask, on accelerate.

Knows how adapters are attached and how the loop steps. Every step is a pure function of the settings and the step's
number: the order of blocks, their spans and the draws come from the seed, nothing from what ran before.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from kv_compression.attention import Patch
from kv_compression.cache import decoder_of
from kv_compression.checkpoints import Checkpoint, Checkpoints
from kv_compression.data import Blocks
from kv_compression.errors import Interrupted, RunError, UsageError
from kv_compression.fields import is_number
from kv_compression.loss import TokenLosses
from kv_compression.presets import Settings
from kv_compression.sentinels import IGNORED
from kv_compression.visibility import TextOnly

log = logging.getLogger(__name__)

LORA_ALPHA, LORA_DROPOUT = 32, 0.05
OPTIMIZER = {"name": "AdamW", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
SEPARATE_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ATTENTION_PROJECTIONS = {  # by transformers' model_type
    "gpt_neox": ("query_key_value", "dense"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "gptj": ("q_proj", "k_proj", "v_proj", "out_proj"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2", "stablelm"), SEPARATE_PROJECTIONS),
}


def lora_targets(model: nn.Module, named: tuple[str, ...] | None) -> list[str]:
    """The modules that LoRA adapts: those `named`, else the attention projections of a known architecture."""
    linear = sorted(
        {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        - {"lm_head", "embed_out"}
    )
    if named:
        missing = [name for name in named if name not in linear]
        if missing:
            raise UsageError(
                f"--lora_target_modules {' '.join(missing)}: no such linear module "
                f"(this model has: {', '.join(linear)})"
            )
        return list(named)
    architecture = model.config.model_type
    if architecture not in ATTENTION_PROJECTIONS:
        raise UsageError(
            f"unknown architecture {architecture}: name its attention projections with --lora_target_modules "
            f"(linear modules it has: {', '.join(linear) or 'none'})"
        )
    return list(ATTENTION_PROJECTIONS[architecture])


def add_lora(model: nn.Module, targets: list[str], r: int, sentinel_ids: tuple[int, ...] = ()) -> peft.PeftModel:
    """The model with LoRA on `targets` (rank r, alpha 32, dropout 0.05, no bias), everything trainable in fp32.

    With `sentinel_ids` these rows of the embedding are trained too, and no other row. (Paper, section 4.1.)
    """
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=LORA_ALPHA,
        lora_dropout=LORA_DROPOUT,
        bias="none",
        target_modules=targets,
        trainable_token_indices=list(sentinel_ids) or None,
    )
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_dropout:
                module.lora_dropout[name] = QuickDropout(LORA_DROPOUT)
    return adapted


class QuickDropout(nn.Dropout):
    """Dropout that draws a CPU's random bits 64 at a time, four times faster than torch; p is kept to 1/65536.

    Elsewhere, and when evaluating, it is torch's. (This project.)
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        dropped = round(self.p * 65536)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.long).random_(-(2**63), None).view(torch.int16)
        kept = (bits[: x.numel()].view(x.shape) >= dropped - 32768).to(x.dtype)
        return x * kept.mul_(65536 / (65536 - dropped))


@dataclass
class TrainingReport:
    """What the loop did: `loss` is the mean over the last tenth of the steps, in nats per token."""

    steps: int
    tokens: int
    seconds: float
    loss: float

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
        self.micro_batches = math.ceil(num_blocks / self.per_micro_batch)
        self.steps_per_epoch = math.ceil(self.micro_batches / settings.gradient_accumulation_steps)
        self.num_steps = settings.max_train_steps or settings.num_train_epochs * self.steps_per_epoch

    def epoch_of(self, step: int) -> int:
        """The epoch that a step (from 0) belongs to."""
        return step // self.steps_per_epoch

    def micro_batches_of(self, step: int, process: int) -> list[list[int]]:
        """The block indices that `process` reads in a step, a list for every micro-batch."""
        order = self._order(self.epoch_of(step))
        size, accumulation = self.settings.per_device_train_batch_size, self.settings.gradient_accumulation_steps
        first = step % self.steps_per_epoch * accumulation
        micro = []
        for number in range(first, min(first + accumulation, self.micro_batches)):
            everyone = order[number * self.per_micro_batch : (number + 1) * self.per_micro_batch]
            micro.append(everyone[process * size : (process + 1) * size] or everyone[-1:])
        return micro

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        return torch.randperm(self.num_blocks, generator=generator).tolist()


class StepData(torch.utils.data.Dataset):
    """Item i holds the micro-batches of step i: a map-style view for torch's DataLoader."""

    def __init__(self, blocks: Blocks, schedule: Schedule, process: int, fixed_spans: bool):
        self.blocks, self.schedule, self.process, self.fixed_spans = blocks, schedule, process, fixed_spans

    def __len__(self) -> int:
        return self.schedule.num_steps

    def __getitem__(self, step: int) -> list[dict[str, torch.Tensor]]:
        self.blocks.epoch = 0 if self.fixed_spans else self.schedule.epoch_of(step)
        return [self.blocks.batch(indices) for indices in self.schedule.micro_batches_of(step, self.process)]


def train(
    model: nn.Module,
    blocks: Blocks,
    patch: Patch,
    accelerator,
    settings: Settings,
    writer,
    checkpoints: Checkpoints | None = None,
    resume: Checkpoint | None = None,
) -> TrainingReport:
    """Fine-tune the adapters of a patched `model`; AdamW without weight decay, settings' schedule and batches.

    `writer` is a tensorboardX SummaryWriter or None. With `checkpoints` the run can go on from one of them, `resume`,
    as if it had never been broken off; SIGINT and SIGTERM then write one, and raise Interrupted. RunError at the first
    loss that is not finite, naming the step and its blocks. (Paper, section 4.1.)
    """
    schedule = Schedule(settings, len(blocks), accelerator.num_processes)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    recipe = {name: value for name, value in OPTIMIZER.items() if name != "name"}
    if settings.sentinel_learning_rate is not None:
        rows = [value for name, value in model.named_parameters() if value.requires_grad and "trainable_tokens" in name]
        others = [value for value in parameters if not any(value is row for row in rows)]
        parameters = [{"params": others}, {"params": rows, "lr": settings.sentinel_learning_rate}]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, **recipe)
    token_losses, optimizer = accelerator.prepare(TokenLosses(model), optimizer)
    scheduler = transformers.get_scheduler(
        settings.lr_scheduler_type,
        optimizer.optimizer,
        num_warmup_steps=settings.num_warmup_steps,
        num_training_steps=schedule.num_steps,
    )
    rule = patch.rule
    data = StepData(blocks, schedule, accelerator.process_index, settings.fixed_spans)
    done = resume.step if resume else 0
    steps = iter(DataLoader(Subset(data, range(done, schedule.num_steps)), batch_size=None, shuffle=False))
    tokens, losses, before = 0, [], 0.0
    if resume is not None:  # behind iter(), which draws a random number
        tokens, losses, before = restore(resume, model, optimizer, scheduler, schedule.num_steps)
    token_losses.train()
    start = time.perf_counter() - before
    hide = not accelerator.is_local_main_process
    try:
        with (
            tqdm(total=schedule.num_steps, initial=len(losses), desc="training", disable=hide) as bar,
            signals_noted(checkpoints is not None) as signals,
        ):
            for step, micro_batches in enumerate(steps, start=len(losses)):
                patch.rule = rule.with_seed(rule.seed + schedule.epoch_of(step))
                teach = Teacher(model, patch, settings.distill_weight) if settings.distill_weight else None
                loss = _step(token_losses, micro_batches, accelerator, optimizer, scheduler, teach)
                if not math.isfinite(loss):
                    where = schedule.micro_batches_of(step, accelerator.process_index)
                    raise RunError(f"the loss is {loss} at step {step + 1}, blocks {where}: lower --learning_rate")
                tokens += sum(int((batch["labels"] != IGNORED).sum()) for batch in micro_batches)
                losses.append(loss)
                speed = tokens * accelerator.num_processes / (time.perf_counter() - start)
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{speed:.0f}")
                log.info("step %d/%d loss %.4f tokens/s %.0f", step + 1, schedule.num_steps, loss, speed)
                if writer is not None:
                    writer.add_scalar("train/loss", loss, step + 1)
                    writer.add_scalar("train/learning_rate", scheduler.get_last_lr()[0], step + 1)
                    writer.add_scalar("train/tokens_per_second", speed, step + 1)
                told = bool(signals)
                if checkpoints is not None and (told or checkpoints.due(step + 1)) and step + 1 < schedule.num_steps:
                    seconds = time.perf_counter() - start
                    checkpoints.write(step + 1, *capture(model, optimizer, scheduler, tokens, losses, seconds))
                if told:
                    raise Interrupted(
                        f"interrupted after step {step + 1} of {schedule.num_steps}: the same command with "
                        "--resume_from_checkpoint goes on"
                    )
    finally:
        patch.rule = rule
    tail = losses[-max(len(losses) // 10, 1) :]
    seconds = time.perf_counter() - start
    return TrainingReport(len(losses), tokens * accelerator.num_processes, seconds, sum(tail) / len(tail))


@contextmanager
def signals_noted(wanted: bool) -> Iterator[list[int]]:
    """Let SIGINT and SIGTERM be noted in a list instead of ending the process; a second one ends it as before."""
    noted: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        noted.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def capture(model: nn.Module, optimizer, scheduler, tokens: int, losses: list[float], seconds: float) -> tuple:
    """All that the next step depends on, as tensors by name and a state that JSON holds."""
    tensors = {f"model.{name}": value for name, value in model.named_parameters() if value.requires_grad}
    for index, values in optimizer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    schedule = {name: value for name, value in scheduler.state_dict().items() if name != "lr_lambdas"}
    return tensors, {"tokens": tokens, "seconds": seconds, "scheduler": schedule}


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
                value.copy_(tensors[f"model.{name}"])
    optimizer_state = optimizer.optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, part = name.split(".")
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
    if not 0 < step < num_steps:
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
        self.patch.rule = TextOnly(rule.cl_id, rule.cr_id, **documents)
        self.model.eval()
        try:
            with self.model.disable_adapter():
                states = decoder_of(self.model)(**batch, use_cache=False).last_hidden_state
        finally:
            self.model.train()
            self.patch.rule = rule
        return {"teacher": states, "distill_weight": self.weight}


def _step(token_losses, micro_batches, accelerator, optimizer, scheduler, teach: Teacher | None = None) -> float:
    """One optimizer step over its micro-batches; returns their mean loss in nats per token."""
    total = 0.0
    for number, batch in enumerate(micro_batches):
        batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        labels = batch.pop("labels")
        last = number == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(token_losses):  # processes exchange gradients once a step
            with accelerator.autocast():
                taught = teach(batch) if teach else {}
                loss = token_losses(labels, **taught, **batch).sum() / (labels != IGNORED).sum()
            accelerator.backward(loss / len(micro_batches))
        total = total + loss.detach()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return float(accelerator.reduce(total / len(micro_batches), reduction="mean"))
