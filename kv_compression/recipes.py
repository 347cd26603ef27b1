"""Recipes: options of KV compression that go together, by name. `--recipe` chooses one; flags that are given hold.

A recipe takes a `Settings` and the names of the settings that the user has chosen, and returns a `Settings`.
"""

from collections.abc import Collection
from dataclasses import replace

from kv_compression.methods.ratio import widest_window


def best_recipe(settings, chosen: Collection[str]):
    """KV compression with the options that worked best here, except for those that are already `chosen`, by name.

    One sink, the widest recent window that leaves room for the spans, and sentinels that learn 20 times as fast as
    the rest. (This project.)
    """
    options = {"sink_tokens": 1, "sentinel_learning_rate": 20 * settings.learning_rate}
    settings = replace(settings, **{name: value for name, value in options.items() if name not in chosen})
    if "recent_tokens" not in chosen and settings.bound_ratio:
        shape = (settings.max_span_length, settings.cr_tokens, settings.sink_tokens)
        settings = replace(settings, recent_tokens=widest_window(settings.block_size, settings.bound_ratio, *shape))
    return settings


def memory_recipe(settings, chosen: Collection[str]):
    """KV compression that is trained to remember what it compresses, except for the options already `chosen`.

    Most training blocks ask for what they said (`data.asking`), spans are as short as the ratio allows, the first token
    is a sink, and LoRA of rank 32 adapts all linear layers. The sentinels learn 10 times as fast. (This project.)
    """
    options = {"sink_tokens": 1, "span_sampler": "shortest", "sentinel_init": "period", "r": 32}
    options |= {"echo_share": 0.5, "fact_share": 0.4, "answer_weight": 5.0, "lora_target_modules": ("all-linear",)}
    options["sentinel_learning_rate"] = 10 * settings.learning_rate
    return replace(settings, **{name: value for name, value in options.items() if name not in chosen})


RECIPES = {"best": best_recipe, "memory": memory_recipe}
