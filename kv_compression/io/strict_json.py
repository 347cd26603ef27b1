"""Reading JSON that anybody may have written: values that could surprise a reader are refused.

Which fields a file must have is checked by `fields`.
"""

import json
import math
from pathlib import Path

DEEPEST = 30  # levels of lists and objects
INTEGERS = range(-(1 << 63), 1 << 63)


def read(path: Path):
    """The value in a JSON file. OSError if it cannot be read, else ValueError as `loads`."""
    return loads(Path(path).read_bytes())


def loads(content: bytes):
    """The value of a JSON text in UTF-8.

    ValueError, in one line, if it is not JSON, or holds a number that is not finite, an integer of more than 64 bits, a
    lone surrogate, or more than `DEEPEST` levels.
    """
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("too deeply nested") from error
    _check(value, DEEPEST)
    return value


def _check(value, depth: int) -> None:
    if not depth:
        raise ValueError("too deeply nested")
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError is a ValueError
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no number of JSON")
    elif isinstance(value, int):
        if value not in INTEGERS:
            raise ValueError("an integer of more than 64 bits")
    elif value is not None:
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            _check(item, depth - 1)
