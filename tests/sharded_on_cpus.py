"""`launched` under FSDP on CPUs: accelerate shards on accelerators alone, so it is told that these are some."""

import runpy

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from kv_compression import processes

processes.state()
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
runpy.run_module("tests.launched", run_name="__main__")
