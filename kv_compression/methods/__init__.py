"""Who sees whom: one file a method, named as the method, and what a mask costs.

`METHODS` maps every method's name to its rule. Each module here that defines a rule of the module's name is found
automatically. `NAMES` are the names alone, which need no torch.
"""

import dataclasses
import importlib
import pkgutil

NOT_METHODS = {"ratio", "rule", "sentinels", "cost"}
NAMES = tuple(sorted({module.name for module in pkgutil.iter_modules(__path__)} - NOT_METHODS))


def __getattr__(name: str):
    if name != "METHODS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = {}
    for method in NAMES:
        rules = vars(importlib.import_module(f"{__name__}.{method}")).values()
        named = [rule for rule in rules if isinstance(rule, type) and vars(rule).get("name") == method]
        if not named:
            raise ImportError(f"kv_compression/methods/{method}.py defines no rule with the name {method!r}")
        found[method] = named[0]
    globals()["METHODS"] = found
    return found


def rule_of(settings, cl_id: int, cr_id: int):
    """The rule of a run's `Settings`, which give the options that the method knows, with these ids of the sentinels."""
    method = __getattr__("METHODS")[settings.method]
    given = {"cl_id": cl_id, "cr_id": cr_id, "ratio": settings.bound_ratio}
    known = [field.name for field in dataclasses.fields(method) if hasattr(settings, field.name)]
    return method(**{name: getattr(settings, name) for name in known} | given)
