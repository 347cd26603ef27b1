"""Damaged files, drawn from a case's number alone, and the loop that hands them to a reader and counts.

A case is a function of its reader's name and its number, so that one that fails can be had again by itself.
"""

import copy
import json
import os
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from kv_compression.io.errors import RunError, UsageError

CASES = 2000
ENDS = ("read", "refused")
DEEP = '"@deep@"'  # in the place of lists that json.dumps could not write
PIECES = [
    b"\xef\xbb\xbf",  # a byte order mark
    b"\xff\xfe",
    b"\x00",
    b"\xed\xa0\x80",  # a lone surrogate, as some programs write it
    b"\xc3",  # half a letter
    *(b"\n", b"\r", b"\r\n", b"\xe2\x80\xa8", b"\x1b[2J", b'"', b"'", b",", b"|", b"\\", b"\\u", b"\\ud83d"),
    *(b"{", b"}", b"[", b"]", b":", b"NaN", b"-Infinity", b"1e999", b"null", b"<CL>", b"PK\x03\x04", b"\x80\x04."),
]
VALUES = [
    *(None, True, False, 0, 1, -1, 3, 0.5, -0.0, 1e-320, 1e308, -1e308, 1.7e308, 2**31, 2**53, 2**63, -(10**400)),
    *(float("nan"), float("inf"), -float("inf"), 10**4000),
    *("", " ", "a", "1", "0.5", "\ud800", "a\nb", "a|b|c", "$x^$", "\x1b[2J", "\u2028", "=1+1", "../../x", "é" * 50),
    *("kv_compression", "full_attention", "sink_attention", "paper", "matched", "embedded", "x" * 5000),
    *([], {}, [[]], {"a": 1}, [1, "a", None], {"mean": 1}, "@deep@"),
]


@dataclass
class Tally:
    """What became of a reader's cases."""

    read: int = 0
    refused: int = 0
    tracebacks: int = 0

    def __str__(self) -> str:
        cases = self.read + self.refused + self.tracebacks
        return f"{cases:,} cases ({self.read:,} read, {self.refused:,} refused), {self.tracebacks:,} tracebacks"


TALLIES: dict[str, Tally] = {}  # by reader, for the summary of a test run


def fuzz(reader: str, make: Callable[[random.Random], object], use: Callable[[object], None], ends=ENDS) -> None:
    """Hand `use` what `make` draws, case by case: it must go well, or end in UsageError or RunError in one line.

    Both must be the end of some cases, or the one of `ends`: else something has not been tried.
    """
    tally = TALLIES.setdefault(reader, Tally())
    alone = os.environ.get("FUZZ_CASE")
    failures = []
    for number in [int(alone)] if alone else range(CASES):
        case = make(random.Random(f"{reader} {number}"))
        try:
            use(case)
        except (UsageError, RunError) as error:
            if len(str(error).splitlines()) == 1 and str(error).isprintable():
                tally.refused += 1
                continue
            failures.append((number, traceback.format_exc()))
        except KeyboardInterrupt:
            raise
        except BaseException:  # a panic of a library in Rust is no Exception
            failures.append((number, traceback.format_exc()))
        else:
            tally.read += 1
    tally.tracebacks += len(failures)
    if failures:
        number, last = failures[0]
        test = os.environ["PYTEST_CURRENT_TEST"].removesuffix(" (call)")
        again = f"FUZZ_CASE={number} python -m pytest '{test}'"
        raise AssertionError(f"{reader}: {len(failures)} cases fail, the first again with {again}\n{last}")
    assert alone or all(getattr(tally, end) > CASES / 100 for end in ends)


def damaged(draw: random.Random, good: bytes) -> bytes:
    """A file's bytes after one to three accidents, or bytes that are none of it."""
    if draw.random() < 0.05:
        return draw.randbytes(draw.randrange(300))
    content = bytearray(good)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        place = draw.randrange(len(content) + 1)
        end = min(place + draw.choice([1, 2, 8, 40]), len(content))
        match draw.randrange(6):
            case 0:
                if place < len(content):
                    content[place] ^= 1 << draw.randrange(8)
            case 1:
                del content[place:end]
            case 2:
                content[place:place] = draw.choice(PIECES)
            case 3:
                content[place:place] = content[place:end] * draw.choice([1, 1, 50])
            case 4:
                other = draw.randrange(len(content) + 1)
                content[place:end] = content[other : other + end - place]
            case 5:
                del content[place if draw.random() < 0.5 else len(content) // 2 :]
    return bytes(content)


def altered(draw: random.Random, value, values: list = VALUES):
    """A copy of a value of JSON in which one to three parts are others, gone, exchanged or wrapped up."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = list(_places(value))
        if not places or draw.random() < 0.02:
            return draw.choice(values)
        box, key = draw.choice(places)
        match draw.randrange(8):
            case 0 | 1 | 2 | 3:
                box[key] = copy.deepcopy(draw.choice(values))
            case 4:
                del box[key]
            case 5:
                other, place = draw.choice(places)
                box[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(box[key])
            case 6:
                box[key] = [box[key]]
            case 7 if isinstance(box, dict):
                box[draw.choice(["", "settings", "a|b", "\ud800", "method", key + "x"])] = box.pop(key)
    return value


def _places(value):
    """Where the parts of a value of JSON are: what holds them, and by which key."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


def as_json(draw: random.Random, value) -> bytes:
    """The JSON text of what `altered` made."""
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    depth = draw.choice([5, 40, 900, 100_000])
    return text.replace(DEEP, "[" * depth + "]" * depth).encode("utf-8", "surrogatepass")


def damaged_json(draw: random.Random, value) -> bytes:
    """A JSON file whose content is another, or whose bytes are damaged, or both."""
    kind = draw.random()
    content = as_json(draw, altered(draw, value) if kind < 0.8 else value)
    return damaged(draw, content) if kind > 0.7 else content
