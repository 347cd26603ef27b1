"""The processes of one launch: which of them this is, and how they share work.

A launch is `accelerate launch`, or a plain call, which has one process. Every process must call the functions of this
module, in the same order.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import TypeVar

import accelerate
import torch
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin, gather_object, parse_flag_from_env

from kv_compression.io.errors import RunError, UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = timedelta(hours=6)  # how long processes wait for another: it may have to download a model
# Has Linux end a process whose parent was killed (PR_SET_PDEATHSIG): it must not write next to its successor.
END_WITH_PARENT = partial(ctypes.CDLL(None).prctl, 1, signal.SIGTERM) if sys.platform == "linux" else None

# What `accelerate launch` or its configuration file may ask for and training here does not support.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_FP8_BACKEND": "fp8",
    "FSDP_IGNORED_MODULES": "ignored modules under FSDP",
}
OFF = ("", "0", "no", "n", "off", "false", "f", "none")
LAUNCH_WITH = "launch with configs/ddp.yaml or configs/fsdp.yaml"


def state() -> accelerate.PartialState:
    """This process's number, how many there are, and its device. UsageError for a launch of a kind in `REFUSED`.

    Without an accelerator, accelerate would take every process for the only one unless it is set to use the CPU; so it
    would before an `Accelerator` exists.
    """
    for variable, what in REFUSED.items():
        if os.environ.get(variable, "").lower() not in OFF:
            raise UsageError(f"accelerate is set to use {what} ({variable}), which is not supported: {LAUNCH_WITH}")
    launched = "LOCAL_RANK" in os.environ
    if launched and END_WITH_PARENT is not None:
        END_WITH_PARENT()
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (launched and not torch.accelerator.is_available())
    return accelerate.PartialState(cpu=bool(cpu), timeout=PATIENCE)


def accelerator(mixed_precision: str) -> accelerate.Accelerator:
    """An Accelerator that depends on a run's settings alone. UsageError as in `state`, and under FSDP 1.

    accelerate's own settings (environment variables, also set from its configuration file) would divide gradients by
    its number of accumulation steps a second time, and compile the model with its dynamo backend.
    """
    state()
    found = accelerate.Accelerator(
        mixed_precision=mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
    )
    if found.distributed_type == accelerate.DistributedType.FSDP and not found.is_fsdp2:
        raise UsageError(f"FSDP needs fsdp_version: 2 in accelerate's configuration: {LAUNCH_WITH}")
    return found


def load_whole_models() -> None:
    """Make every process load whole models.

    Under FSDP, transformers fills in weights only when a model is sharded, which only training does.
    """
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def run_everywhere(work: Callable[..., Result], *arguments, here: bool = True) -> Result | None:
    """Run `work` in every process and return its result in this one; processes without `here` skip it and get None.

    All wait for the slowest. A UsageError or RunError in one process is raised in all of them, so that none waits for a
    process that has ended.
    """
    result, failure = None, None
    try:
        result = work(*arguments) if here else None
    except (UsageError, RunError) as error:
        failure = error
    if state().num_processes == 1:
        if failure is not None:
            raise failure
        return result
    failures = gather_object([failure and (isinstance(failure, UsageError), str(failure))])
    for usage, message in filter(None, failures):
        raise (UsageError if usage else RunError)(message) from failure
    return result


def split_work(work: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
    """The results of `work` for all items, in their order; each of n processes works on every n-th item.

    Fails as `run_everywhere`.
    """
    number, every = state().process_index, state().num_processes
    results: list[Result] = [None] * len(items)
    for first, part in enumerate(gather_object([run_everywhere(work, items[number::every])])):
        results[first::every] = part
    return results


def on_main(work: Callable[..., Result], *arguments) -> Result:
    """Run `work` in the main process alone and return its result everywhere. Fails as `run_everywhere`."""
    return gather_object([run_everywhere(work, *arguments, here=state().is_main_process)])[0]


def main_first(work: Callable[..., Result], *arguments) -> Result:
    """Run `work` in each machine's main process, then in its others, which find caches filled; its result here.

    Fails as `run_everywhere`.
    """
    first = state().is_local_main_process
    found = run_everywhere(work, *arguments, here=first), run_everywhere(work, *arguments, here=not first)
    return found[0 if first else 1]
