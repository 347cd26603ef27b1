"""LoRA on a model's attention, and the two sentinel rows."""

import peft
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from kv_compression.io.errors import UsageError
from kv_compression.model.dropout import replace_dropout

LORA_ALPHA, LORA_DROPOUT = 32, 0.05
ALL_LINEAR = "all-linear"

SEPARATE_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


ATTENTION_PROJECTIONS = {  # by transformers' model_type
    "gpt_neox": ("query_key_value", "dense"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "gptj": ("q_proj", "k_proj", "v_proj", "out_proj"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2", "stablelm"), SEPARATE_PROJECTIONS),
}


def lora_targets(model: nn.Module, named: tuple[str, ...] | None) -> list[str]:
    """The modules that LoRA adapts: those `named` (all: "all-linear"), else those of attention."""
    linear = sorted(
        {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        - {"lm_head", "embed_out"}
    )
    if named == (ALL_LINEAR,):
        return linear
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

    With `sentinel_ids` these rows of the embedding are trained too, and no other row. The model's `draws` decide what
    dropout drops. (Paper, section 4.1.)
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
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    adapted.draws = replace_dropout(
        [layer.lora_dropout for layer in layers], max(layer.in_features for layer in layers)
    )
    return adapted
