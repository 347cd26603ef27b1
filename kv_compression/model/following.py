"""Continuing a cache with new tokens: what `generate` takes, and what it must refuse."""

from collections.abc import Mapping
from functools import wraps
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from kv_compression.model.cache import SentinelCache, fingerprint_of

ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def inputs_after(cache: SentinelCache, input_ids: Tensor | Mapping, attention_mask: Tensor | None = None) -> dict:
    """`SentinelCache.followed_by`."""
    if isinstance(input_ids, Mapping):
        attention_mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
        input_ids = input_ids["input_ids"]
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        raise ValueError('new tokens are a tensor (batch, new): call the tokenizer with return_tensors="pt"')
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device).long()
    if real.shape != input_ids.shape:
        raise ValueError(f"attention_mask is {tuple(real.shape)}, the new tokens are {tuple(input_ids.shape)}")
    if not bool(real.any(-1).all()) or not input_ids.numel():
        raise ValueError("give every row at least one new token: the cache keeps no scores for what it has read")
    rows = len(cache.kinds) if cache.slots else len(input_ids)
    if rows not in (1, len(input_ids)):
        raise ValueError(f"the cache holds {rows} rows, but {len(input_ids)} were given")
    to_the_left = real.argsort(dim=-1, stable=True)
    read = real.new_ones(len(input_ids), cache.get_seq_length())
    own = cache.copy()
    own.repeats_rows = True
    inputs = {
        "input_ids": input_ids.gather(1, to_the_left),
        "attention_mask": torch.cat([read, real.gather(1, to_the_left)], dim=1),
        "past_key_values": own,
    }
    if cache.rule.uses_sentinels:
        inputs["suppress_tokens"] = [cache.rule.cl_id, cache.rule.cr_id]
    return inputs


def refuse_misreading(
    cache: SentinelCache, input_ids: Tensor, attention_mask: Tensor | None, slices: bool = True
) -> None:
    """ValueError unless `generate` will read just what is new of these tokens `(batch, length)`.

    transformers takes them for new where the mask is longer by what the cache has read (see `followed_by`). Else
    it takes them for all that was read and more, and cuts off as many as were read, whatever they are: they must
    begin with what was read. `slices` is False where it does not cut, in assisted generation.
    """
    read, length = cache.get_seq_length(), input_ids.shape[1]
    masked = length if attention_mask is None else attention_mask.shape[1]
    if not read or masked == read + length:
        return
    if slices and masked == length > read and len(input_ids) == len(cache.kinds):
        ids, real = (part if part is None else part[:, :read] for part in (input_ids, attention_mask))
        text = cache.rule.text(ids, real)
        found = fingerprint_of(ids, text.cumsum(-1) - 1, text).to(cache.fingerprint.device)
        if torch.equal(found, cache.fingerprint) and text.sum(-1).tolist() == cache.text_read.tolist():
            return
    raise ValueError(
        f"the cache has read {read} tokens already, and cannot tell what is new of these {length}: give generate "
        "the new tokens alone, model.generate(**cache.followed_by(new_tokens))"
    )


class GenerateGuard:
    """Makes a model's `generate` refuse tokens that a filled `SentinelCache` would misread, until `remove()`."""

    def __init__(self, model: nn.Module):
        self.model = model
        model.generate = MethodType(_guarded_generate, model)  # bound, so that a copy of the model has its own

    def remove(self) -> None:
        """Restore the model's own `generate`. Calling it twice is harmless."""
        self.model.__dict__.pop("generate", None)


@wraps(GenerationMixin.generate)
def _guarded_generate(self, inputs=None, generation_config=None, *args, **kwargs):
    cache = kwargs.get("past_key_values")
    ids = kwargs.get("input_ids") if inputs is None else inputs
    if isinstance(cache, SentinelCache) and ids is not None:
        config = generation_config or self.generation_config
        if kwargs.get("use_cache", getattr(config, "use_cache", None)) is False:
            raise ValueError("use_cache=False reads all tokens again at every step, on top of what the cache holds")
        assisted = any(kwargs.get(name) or getattr(config, name, None) for name in ASSISTED)
        refuse_misreading(cache, ids, kwargs.get("attention_mask"), slices=not assisted)
    return type(self).generate(self, inputs, generation_config, *args, **kwargs)
