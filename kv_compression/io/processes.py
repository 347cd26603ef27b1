"""The processes of one launch: which of them this is, and what they do together.

A launch is `accelerate launch`, or a plain call, which has one process. Knows accelerate; what the work is, is the
callers' business. Whoever calls a function of this module calls it in every process, in the same order.
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

PATIENCE = timedelta(hours=6)  # of processes that wait for one: a model may have to be downloaded first
# Linux ends a process whose parent is killed (PR_SET_PDEATHSIG), so that it does not write beside its successor.
END_WITH_PARENT = partial(ctypes.CDLL(None).prctl, 1, signal.SIGTERM) if sys.platform == "linux" else None

# What `accelerate launch` or a configuration file of accelerate may ask for and training here cannot do right.
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

    accelerate alone takes every process for the only one where a launch finds no accelerator, unless it is told to
    use the CPU, and where this is asked before there is an `Accelerator`.
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
    """An Accelerator that a run's settings alone decide about. UsageError as `state`, and under FSDP 1.

    accelerate's own settings (its environment variables, which its configuration file becomes) would divide gradients
    by its number of accumulation steps once more, and compile the model with its dynamo backend.
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
    """Have every process load its models as if it were alone.

    Under FSDP transformers leaves it to the sharding of a model, which only training does, to fill in weights.
    """
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def together(work: Callable[..., Result], *arguments, here: bool = True) -> Result | None:
    """What `work` returns in this process, None unless `here`, once every process has done its part.

    A UsageError or RunError of one is raised in all of them: none is left waiting for a process that is gone.
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
    told = gather_object([failure and (isinstance(failure, UsageError), str(failure))])
    for usage, message in filter(None, told):
        raise (UsageError if usage else RunError)(message) from failure
    return result


def divided(work: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
    """What `work` makes of items, a result each, in their order; each process works on every n-th.

    Fails as `together`.
    """
    number, every = state().process_index, state().num_processes
    results: list[Result] = [None] * len(items)
    for first, part in enumerate(gather_object([together(work, items[number::every])])):
        results[first::every] = part
    return results


def on_main(work: Callable[..., Result], *arguments) -> Result:
    """What `work` returns in the main process, the only one that does it. Fails as `together`."""
    return gather_object([together(work, *arguments, here=state().is_main_process)])[0]


def one_first(work: Callable[..., Result], *arguments) -> Result:
    """What `work` returns here, done by one process of a machine before the others, which then find its caches filled.

    Fails as `together`.
    """
    first = state().is_local_main_process
    found = together(work, *arguments, here=first), together(work, *arguments, here=not first)
    return found[0 if first else 1]
