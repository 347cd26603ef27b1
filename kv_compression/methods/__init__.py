"""Who sees whom: one file a method, named as the method, and what a mask costs.

`METHODS` maps every method's name to its rule: each module here that defines a rule of its own name is found by itself.
"""

import importlib
import pkgutil

from kv_compression.methods.rule import Rule

NOT_METHODS = {"rule", "sentinels", "cost"}


def _found() -> dict[str, type[Rule]]:
    """The rule of every method file in this folder, by name."""
    names = sorted({module.name for module in pkgutil.iter_modules(__path__)} - NOT_METHODS)
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {
        name: next(rule for rule in vars(module).values() if isinstance(rule, type) and vars(rule).get("name") == name)
        for name, module in modules.items()
    }


METHODS = _found()
