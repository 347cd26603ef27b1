"""Context compression with sentinel tokens: spans, masks, a compressed cache, and the experiments around them.

Five names are for other people's code. `load` gives a trained run's model, `attach` puts a rule to work in any model,
`compress` reads a text into a `SentinelCache` that holds a fraction of its keys, and a `Budget` keeps a cache small
while it grows::

    import kv_compression as kvc

    model, tokenizer = kvc.load(run)
    cache = kvc.compress(model, tokenizer, text, ratio=0.9)
    question = tokenizer(" So what", return_tensors="pt")
    output = model.generate(**cache.followed_by(question), max_new_tokens=20)
    cache.save("prefix.safetensors")
    cache = kvc.SentinelCache.load("prefix.safetensors")

`run` is a folder that run_clm.py or export_model.py has left, or a repository on the Hugging Face hub with what is in
one. Everything else is in the modules, and may change.
"""

import importlib

_WHERE = {"load": "api", "attach": "api", "compress": "api", "SentinelCache": "model.cache", "Budget": "model.budget"}

__all__ = list(_WHERE)


def __getattr__(name: str):
    # Only when asked for: scripts that show their flags should not wait for torch.
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
