"""How well a model predicts the blocks of a split, and what its mask kept of them."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from kv_compression.data.blocks import Blocks
from kv_compression.methods.cost import MaskCost, measure
from kv_compression.methods.rule import Rule
from kv_compression.methods.sentinels import IGNORED


@dataclass(frozen=True)
class Evaluation:
    """A model's score on one split: `nll` in nats per token, and perplexity = exp(nll).

    In the protocol `matched` every target token weighs the same. In `paper` `nll` is the mean over batches of the
    batch's mean, as in the published code. `nll_per_token` and `nll_per_batch` are these two in both protocols.
    `methods.cost.MaskCost` explains the four figures of the mask.
    """

    perplexity: float
    nll: float
    nll_per_token: float
    nll_per_batch: float
    num_targets: int
    num_blocks: int
    removed_fraction: float
    attended_fraction: float
    kept_keys_mean: float
    kept_keys_max: int
    seconds: float


def to_perplexity(nll: float) -> float:
    """exp(nll), infinite if no float can hold it."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """All indices in batches, blocks of similar length together; the last batch may be smaller."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.no_grad()
def evaluate(
    token_losses, blocks: Blocks, rule: Rule, accelerator, *, batch_size: int, protocol: str, note=""
) -> Evaluation:
    """Score a patched model on `blocks`; processes share the batches, and each token counts once.

    `token_losses` is a `TokenLosses`, plain or prepared by accelerate. `rule` is the one that the model attends by: its
    cost is measured on the very blocks that are scored.
    """
    token_losses.eval()
    start = time.perf_counter()
    nll = batch_nll = 0.0
    targets = num_batches = 0
    cost = MaskCost()
    drawn = {index: blocks[index] for index in range(len(blocks))}
    batches = batches_by_length([len(block) for block in drawn.values()], batch_size)
    rounds = range(accelerator.process_index, len(batches) + accelerator.process_index, accelerator.num_processes)
    for number in tqdm(rounds, desc=f"evaluating {note}", disable=not accelerator.is_main_process, leave=False):
        # A process that has run out of batches repeats the last: a sharded model needs a call from every process.
        batch = blocks.batch(batches[min(number, len(batches) - 1)], drawn)
        inputs = {name: value.to(accelerator.device) for name, value in batch.items()}
        labels = inputs.pop("labels")
        with accelerator.autocast():
            losses = token_losses(labels, **inputs)
        if number >= len(batches):
            continue
        cost += measure(rule, batch["input_ids"], batch["attention_mask"])
        loss = losses.cpu().double().sum().item()  # not every device has float64
        count = int((batch["labels"] != IGNORED).sum())
        nll, targets = nll + loss, targets + count
        batch_nll, num_batches = batch_nll + loss / count, num_batches + 1
    everyone = gather_object([((nll, targets, batch_nll, num_batches), cost)])
    nll, targets, batch_nll, num_batches = map(sum, zip(*(sums for sums, _ in everyone)))
    cost = sum((cost for _, cost in everyone), MaskCost())
    per_token, per_batch = nll / targets, batch_nll / num_batches
    mean = per_batch if protocol == "paper" else per_token
    return Evaluation(
        perplexity=to_perplexity(mean),
        nll=mean,
        nll_per_token=per_token,
        nll_per_batch=per_batch,
        num_targets=targets,
        num_blocks=len(blocks),
        removed_fraction=cost.removed_fraction,
        attended_fraction=cost.attended_fraction,
        kept_keys_mean=cost.kept_keys_mean,
        kept_keys_max=cost.most_kept,
        seconds=time.perf_counter() - start,
    )
