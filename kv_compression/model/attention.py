"""The patch: a causal language model that derives attention mask and position ids from its token ids alone.

One hook on the decoder replaces the two arguments before every forward pass; transformers carries them to its own
attention functions, so every implementation it has (sdpa, flex_attention, eager) and every architecture that takes a
ready 4D mask works unchanged; what a layer's own sliding window or chunk hides stays hidden. Two more implementations
are registered here: `grouped`, for CPUs, and `sorted_flex_attention`, for long blocks. Knows models; which keys are
visible is a `methods.rule.Rule`.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import eager_mask, flex_attention_mask

from kv_compression.io.errors import UsageError
from kv_compression.methods.rule import MaskMod, Rule, block_mask, dense_mask, in_order, own_key
from kv_compression.methods.sentinels import count_text
from kv_compression.model.architectures import (
    Pattern,
    causal_lm_of,
    check_architecture,
    decoder_of,
    patterns_of,
    positions_of,
)
from kv_compression.model.cache import SentinelCache


def grouped_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, s_aux=None, **kwargs
):
    """Attention as three matrix products, query heads that share a key head taken together.

    On a CPU this trains about 2.5 times faster than torch's fused kernel under a mask of any shape, at the price of
    holding the scores: for blocks up to some thousand tokens. `query` is `(batch, heads, queries, width)`, `key`
    `(batch, key heads, keys, width)` and `value` `(batch, key heads, keys, value width)`; returns
    `(batch, queries, heads, value width)` and no weights, as transformers expects. `softcap` bounds the scores (Gemma
    2), `s_aux` `(heads,)` are scores of a key without a value (GPT-OSS). (This project.)
    """
    batch, heads, queries, width = query.shape
    groups = (batch, key.shape[1], heads // key.shape[1] * queries)
    query = (query * (width**-0.5 if scaling is None else scaling)).reshape(*groups, width)
    scores = query @ key.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores.view(batch, key.shape[1], -1, queries, key.shape[2]).add_(attention_mask[:, :, None])
    if s_aux is not None:
        aside = s_aux.view(1, key.shape[1], -1, 1).expand(batch, -1, -1, queries).reshape(*groups, 1)
        scores = torch.cat([scores, aside.to(scores.dtype)], dim=-1)
    weights = torch.nn.functional.dropout(scores.softmax(-1)[..., : key.shape[2]], dropout, module.training)
    return (weights @ value).view(batch, heads, queries, value.shape[-1]).transpose(1, 2).contiguous(), None


def sorted_flex_attention(module, query, key, value, attention_mask, **kwargs):
    """FlexAttention with the keys in the order `attention_mask.key_order`, `(batch, keys)`, that its mask is for.

    Attention does not mind in which order it finds its keys. FlexAttention leaves tiles of 128 x 128 out in which
    nobody sees anything, but as text stands, every tile below the diagonal has some <CR>. Sorted by how long they are
    seen, the keys of closed spans share tiles that are empty but for a narrow band. (This project.)
    """
    order = attention_mask.key_order[:, None, :, None]
    key, value = (
        states.gather(2, order.expand(-1, *states.shape[1:2], -1, states.shape[3])) for states in (key, value)
    )
    return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)


GROUPED, FLEX, SORTED_FLEX = "grouped", "flex_attention", "sorted_flex_attention"
IMPLEMENTATIONS = ("sdpa", "eager", GROUPED, FLEX, SORTED_FLEX)  # others have no use for a mask of any shape
AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, eager_mask)
AttentionInterface.register(SORTED_FLEX, sorted_flex_attention)
AttentionMaskInterface.register(SORTED_FLEX, flex_attention_mask)


class Patch:
    """Makes `model(input_ids)` attend by a rule until `remove()`, or the end of a with-block.

    `model` is a transformers causal language model or a peft model around one, of an architecture that is known to be
    right under a patch (`architectures`). Afterwards it is as it was. `rule` may be exchanged at any time. A 2D
    `attention_mask` given to the model marks padding, on either side. Raises ValueError if the model is patched
    already, or cannot be, with the reason. (Paper, section 3, for the rule; this project for the patch.)
    """

    def __init__(self, model: nn.Module, rule: Rule):
        self.decoder = decoder = decoder_of(model)
        self.rule = rule
        if hasattr(decoder, "_sentinel_patch"):
            raise ValueError("the model is patched already: remove that patch first, or exchange its rule")
        check_architecture(causal_lm_of(model), decoder)
        self.patterns = patterns_of(decoder)
        self._hooks = [
            decoder.register_forward_pre_hook(torch.compiler.disable(self._derive), with_kwargs=True),
            decoder.register_forward_hook(torch.compiler.disable(self._settle), with_kwargs=True),
        ]
        decoder._sentinel_patch = self
        forget_compiled_code()

    def remove(self) -> None:
        """Take the patch off. Doing so twice is harmless."""
        for hook in self._hooks:
            hook.remove()
        if getattr(self.decoder, "_sentinel_patch", None) is self:
            del self.decoder._sentinel_patch
            forget_compiled_code()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    def _derive(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Replace the attention mask and the position ids of a forward call."""
        input_ids = args[0] if args else kwargs.get("input_ids")
        if input_ids is None:
            raise ValueError("a patched model needs input_ids: masks cannot be derived from inputs_embeds")
        if len(args) > 1:
            raise ValueError("call a patched decoder with keyword arguments")
        padding = kwargs.get("attention_mask")
        if padding is not None and padding.dim() != 2:
            raise ValueError("a patched model makes its own masks: attention_mask may only be (batch, length) padding")

        cache = kwargs.get("past_key_values")
        if isinstance(cache, SentinelCache):
            if not cache.rule.same_as(self.rule):
                raise ValueError(f"the cache is for {cache.rule}, the model is patched with {self.rule}")
            most = cache.get_seq_length() + input_ids.shape[1]
            check_positions(decoder, most, lambda: cache.text_after(input_ids, padding))
            seen, positions = cache.admit(decoder, input_ids, padding)
            masks = self._layer_masks(lambda pattern: self._of_cache(pattern, cache, seen, positions))
            return args, kwargs | {"position_ids": positions, "attention_mask": masks}
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError("only a SentinelCache knows what a patched model may see of it: give past_key_values one")
        positions = self.rule.position_ids(input_ids, padding)
        check_positions(decoder, input_ids.shape[1], lambda: int(positions.max()) + 1)
        visible = self.rule.visible(input_ids, padding)
        masks = self._layer_masks(lambda pattern: self._of_pass(pattern, visible, input_ids, padding))
        return args, kwargs | {"position_ids": positions, "attention_mask": masks}

    def _layer_masks(self, mask_of: Callable[[Pattern], Any]) -> Any:
        """The mask of all layers, or, where their patterns differ, of every type of layer by its name."""
        implementation = self.decoder.config._attn_implementation
        if implementation not in IMPLEMENTATIONS:
            raise UsageError(
                f"{implementation} takes no mask of its own: load the model with attn_implementation="
                f"{' or '.join(IMPLEMENTATIONS[:2])}"
            )
        masks = {pattern: mask_of(pattern) for pattern in set(self.patterns.values())}
        if len(masks) == 1:
            return next(iter(masks.values()))
        return {layer_type: masks[pattern] for layer_type, pattern in self.patterns.items()}

    def _of_pass(self, pattern: Pattern, visible: MaskMod, input_ids: Tensor, padding: Tensor | None):
        """A pattern's mask for whole blocks of which the rule lets this much be `visible`."""
        if pattern.size:
            visible = pattern.over(visible, count_text(self.rule.text(input_ids, padding)))
        return mask_for(self.decoder, self.rule, visible, input_ids)

    def _of_cache(self, pattern: Pattern, cache: SentinelCache, seen: Tensor | None, positions: Tensor):
        """A pattern's mask for the tokens that a cache has just admitted; None if they see all there is."""
        if pattern.size:
            near = pattern.allows(positions[:, :, None], cache.positions[:, None, :])
            seen = near if seen is None else seen & near
            seen = seen | own_key(positions.shape[1], cache.slots, seen.device)
        return None if seen is None else as_attention_mask(self.decoder, seen)

    def _settle(self, decoder: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """Have the cache drop the keys that no later token can see."""
        cache = kwargs.get("past_key_values")
        if isinstance(cache, SentinelCache):
            cache.settle()


def forget_compiled_code() -> None:
    """Have code that torch has compiled compiled again: it does not notice that a module's hooks have changed."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def check_positions(decoder: nn.Module, most: int, count: Callable[[], int]) -> None:
    """Raise UsageError if a text needs more positions than the decoder has: `most` at most, exactly `count()`."""
    positions = positions_of(decoder.config)
    if positions is not None and most > positions and (needed := count()) > positions:
        raise UsageError(f"the text has {needed} tokens, more than the model's {positions} positions: shorten it")


def mask_for(decoder: nn.Module, rule: Rule, visible: MaskMod, input_ids: Tensor):
    """What is visible, as the decoder's attention implementation takes it: a `BlockMask` for FlexAttention."""
    implementation = decoder.config._attn_implementation
    if implementation == FLEX:
        return block_mask(visible, *input_ids.shape, input_ids.device)
    if implementation == SORTED_FLEX:
        order = rule.key_order(input_ids)
        mask = block_mask(in_order(visible, order), *input_ids.shape, input_ids.device)
        mask.key_order = order
        return mask
    return as_attention_mask(decoder, dense_mask(visible, *input_ids.shape, input_ids.device))


def as_attention_mask(decoder: nn.Module, seen: Tensor) -> Tensor:
    """A bool mask `(batch, queries, keys)` as transformers takes it, `(batch, 1, queries, keys)`.

    Bool for sdpa; for others in the model's dtype, 0 where visible and the lowest finite number elsewhere.
    """
    mask = seen[:, None]
    if decoder.config._attn_implementation == "sdpa":
        return mask
    dtype = decoder.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
