"""Which blocks an optimizer step reads, and at which learning rate.

Every step is a pure function of the settings and the step's number: the order of blocks, their spans and all draws
follow from the seed, not from earlier steps or the number of processes.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from kv_compression.data.blocks import Blocks
from kv_compression.methods.sentinels import IGNORED
from kv_compression.settings import Settings

EPOCHS_APART = 1_000_003  # far enough that no other run uses an epoch's seed


class Schedule:
    """Epochs of shuffled blocks in micro-batches, and the learning rate of every optimizer step.

    transformers' scheduler is created for `scheduler_steps`, of which `scheduler_warmup_steps` are warm-up, and steps
    once per optimizer step. With `settings.published_schedule` both are multiplied by the accumulation steps, as in the
    published scripts: the linear decay then ends at (1 − 1/accumulation) of its start. (Paper, section 4.1, and the
    code published with it.)
    """

    def __init__(self, settings: Settings, num_blocks: int, num_processes: int):
        self.settings = settings
        self.num_blocks = num_blocks
        self.per_micro_batch = settings.per_device_train_batch_size * num_processes
        self.per_step = self.per_micro_batch * settings.gradient_accumulation_steps
        self.steps_per_epoch = math.ceil(num_blocks / self.per_step)
        self.num_steps = settings.max_train_steps or settings.num_train_epochs * self.steps_per_epoch
        counted = settings.gradient_accumulation_steps if settings.published_schedule else 1
        self.scheduler_steps = self.num_steps * counted
        self.scheduler_warmup_steps = settings.num_warmup_steps * counted

    def learning_rates(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """The scheduler that sets the optimizer's learning rate."""
        steps = {"num_warmup_steps": self.scheduler_warmup_steps, "num_training_steps": self.scheduler_steps}
        return transformers.get_scheduler(self.settings.lr_scheduler_type, optimizer, **steps)

    def epoch_of(self, step: int) -> int:
        """The epoch of a step (both from 0)."""
        return step // self.steps_per_epoch

    def blocks_of(self, step: int) -> list[int]:
        """The indices of the blocks that all processes read in a step; the last step of an epoch may have fewer."""
        order = _shuffled(self.num_blocks, self.settings.seed, self.epoch_of(step))
        first = step % self.steps_per_epoch * self.per_step
        return order[first : first + self.per_step]

    def micro_batches(self, blocks: list[int]) -> list[list[int]]:
        """The blocks of a step, in the given order, as micro-batches of all processes."""
        return [blocks[start : start + self.per_micro_batch] for start in range(0, len(blocks), self.per_micro_batch)]

    def share(self, micro_batch: list[int], process: int) -> list[int]:
        """What one process reads of a micro-batch; nothing if the micro-batch is too small."""
        size = self.settings.per_device_train_batch_size
        return micro_batch[process * size : (process + 1) * size]


@lru_cache(maxsize=4)
def _shuffled(num_blocks: int, seed: int, epoch: int) -> list[int]:
    """The order of the blocks in an epoch."""
    generator = torch.Generator().manual_seed(seed * EPOCHS_APART + epoch)
    return torch.randperm(num_blocks, generator=generator).tolist()


class MicroBatch(NamedTuple):
    """What a process reads at once, the `inputs` of `blocks`; how many targets all processes read, and their weight."""

    inputs: dict[str, Tensor]
    blocks: list[int]
    num_targets: int
    weight: float


class StepData(torch.utils.data.Dataset):
    """Item i holds the micro-batches of step i, for torch's DataLoader."""

    def __init__(self, blocks: Blocks, schedule: Schedule, process: int, fixed_spans: bool):
        self.blocks, self.schedule, self.process, self.fixed_spans = blocks, schedule, process, fixed_spans

    def __len__(self) -> int:
        return self.schedule.num_steps

    def asking_shares(self) -> tuple[float, float]:
        """The share of blocks that ask for what they said, and of targets that are answers, over all steps."""
        if self.blocks.asking is None:
            return 0.0, 0.0
        read = asking = targets = answers = 0
        for step in range(len(self)):
            self._begin(step)
            for index in self.schedule.blocks_of(step):
                asked = self.blocks.asked(index)
                read, targets = read + 1, targets + self.blocks.num_targets(index)
                if asked is not None:
                    asking, answers = asking + 1, answers + int(asked.answers.sum())
        return asking / read, answers / targets

    def _begin(self, step: int) -> None:
        self.blocks.epoch = 0 if self.fixed_spans else self.schedule.epoch_of(step)

    def __getitem__(self, step: int) -> list[MicroBatch]:
        self._begin(step)
        drawn = {index: self.blocks[index] for index in self.schedule.blocks_of(step)}
        by_length = sorted(drawn, key=lambda index: len(drawn[index]))  # similar lengths need the least padding
        return [self._micro_batch(everyone, drawn) for everyone in self.schedule.micro_batches(by_length)]

    def _micro_batch(self, everyone: list[int], drawn: dict[int, list[int]]) -> MicroBatch:
        own = self.schedule.share(everyone, self.process)
        read = own or everyone[-1:]  # a process without blocks must still take part
        inputs = self.blocks.batch(read, drawn)
        if not own:
            inputs["labels"].fill_(IGNORED)
        num_targets, weight = (sum(map(count, everyone)) for count in (self.blocks.num_targets, self.blocks.weight))
        return MicroBatch(inputs, read, num_targets, weight)
