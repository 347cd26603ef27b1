"""JSON that anybody may have written: what is parsed holds nothing that its reader would have to look out for.

Knows JSON only; which fields a file must have is its reader's business.
"""

import json
import math
from pathlib import Path

DEEPEST = 30  # lists within lists
INTEGERS = range(-(1 << 63), 1 << 63)


def read(path: Path):
    """The value in a JSON file. OSError if it cannot be read, else ValueError as `loads`."""
    return loads(Path(path).read_bytes())


def loads(content: bytes):
    """The value of a JSON text in UTF-8.

    ValueError, in one line, if it is none, or holds a number that is not finite, an integer of more than 64 bits, text
    that is not Unicode (lone surrogates), or lists within lists beyond all use.
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
