"""The parts of a model that others hold on to: its decoder, the model inside peft's, its input device."""

import torch
from torch import nn


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder that a patch hooks: of a causal language model, or of a peft model around one."""
    return causal_lm_of(model).get_decoder()


def causal_lm_of(model: nn.Module) -> nn.Module:
    """The causal language model itself: what a peft model wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def input_device(model: nn.Module) -> torch.device:
    """The device on which token ids belong: the one where the input embedding is computed.

    accelerate's hooks say so for a model that is offloaded or spread over devices (`device_map`): its weights may lie
    on "meta" until they are needed.
    """
    embedding = causal_lm_of(model).get_input_embeddings()
    for module in embedding.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if getattr(each, "execution_device", None) is not None:
                return torch.device(each.execution_device)
    parameters = (*embedding.parameters(), *model.parameters())
    return next((each.device for each in parameters if not each.is_meta), parameters[0].device)
