"""A model's weights in memory: in which precision a folder holds them, and how an adapter is merged into them."""

from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.modeling_utils import load_state_dict

HALVES = {torch.float16, torch.bfloat16}


def stored_dtype(folder: Path | None) -> torch.dtype:
    """fp16 or bf16 if all floating-point weights in `folder` are stored so, else fp32, which holds either exactly."""
    found: set[torch.dtype] = set()
    try:
        files = [] if folder is None else [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
        for path in files:
            weights = load_state_dict(path, map_location="meta")  # shapes and dtypes alone
            found |= {weight.dtype for weight in weights.values() if weight.is_floating_point()}
    except Exception:  # readers raise whatever their parsers do, and loading says what is wrong
        found = set()
    return found.pop() if len(found) == 1 and found <= HALVES else torch.float32


def merge_adapter(model: peft.PeftModel, dtype: torch.dtype) -> nn.Module:
    """The base model with the adapter merged in, its parameters in `dtype`.

    Each layer is merged in fp32 and rounded once, one after another: never is more than one of them held in fp32.
    Buffers stay as they are: the angles of rotary embeddings stay exact.
    """
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        base = layer.get_base_layer()
        cast(base, torch.float32, copy=True)  # a weight may be a mapped file, which would keep what is written to it
        layer.merge()
        cast(base, dtype)
    merged = model.unload()
    cast(merged, dtype)
    merged.config.dtype = dtype
    return merged


def cast(module: nn.Module, dtype: torch.dtype, copy: bool = False) -> None:
    """Put a module's parameters, and no buffers, into `dtype`, in memory of their own with `copy`."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype, copy=copy)
