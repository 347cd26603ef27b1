"""`launched` under FSDP on CPUs: accelerate shards on accelerators alone, so it is told that these are some.

With END_AT in the environment, one of the processes is told to end after so many steps of training.
"""

import os
import runpy
import signal

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from kv_compression.io import processes
from kv_compression.training import loop as training_loop

processes.state()
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
add = training_loop.Progress.add


def add_and_end(progress, *results) -> None:
    add(progress, *results)
    if len(progress.losses) == int(os.environ["END_AT"]) and processes.state().process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)


if "END_AT" in os.environ:
    training_loop.Progress.add = add_and_end
runpy.run_module("tests.launched", run_name="__main__")
