"""Command-line flags: made from the fields of a dataclass, checked as they are, and parsed with errors of one line."""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

from kv_compression.io.errors import UsageError, complain
from kv_compression.io.ownership import file_name

METAVARS = {int: "N", float: "X", str: "NAME", tuple: "NAME"}
HELP_COLUMN = 28


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a field of a dataclass says about itself, besides its type and default.

    It is explained by `help` in the `group` of `--help`; without a group it has no flag. Its value is one of `choices`
    (the flag may also be "auto", if `auto`), or a number that is at `least`, at `most`, `above` or `below` a bound.
    `in_words` is the default in words, where the value itself does not say it, or "required". A flag with a `const`
    has this value if it is given without one. `read` reads the flag's text, if that says more than the field's type can
    hold.
    """

    group: str | None = None
    help: str = ""
    choices: Collection[str] | None = None
    auto: bool = False
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    in_words: str = ""
    const: str | None = None
    metavar: str | None = None
    read: Callable[[str], object] | None = None

    @property
    def bounds(self) -> str:
        """The bounds in words, "" if there are none."""
        if self.most is not None:
            return f"from {self.least} to {self.most}"
        lower = f"above {self.above}" if self.above is not None else f"at least {self.least}"
        lower = "" if self.above is None and self.least is None else lower
        return " and ".join(filter(None, [lower, "" if self.below is None else f"below {self.below}"]))

    def holds(self, number: float) -> bool:
        """Whether a number is within the bounds, which NaN never is."""
        return (
            (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def without(self, default) -> str:
        """What holds if the flag is not given, as `--help` says it; `default` is the field's."""
        words = self.in_words or in_words(default)
        return words if words == "required" else f"default: {words}"


def option(default, help: str, **about):
    """A field of a request, with what `flags.Option` has to say about it."""
    return field(default=default, metadata={"about": Option(help=help, **about)})


def in_words(value) -> str:
    """A default as `--help` says it."""
    return "off" if value is False else "none" if value is None else str(value)


def check(name: str, value, kind: type | UnionType, option: Option) -> None:
    """Raise UsageError unless a field may have this value, which may come from a file."""
    if not is_of_type(value, kind):
        raise UsageError(f"--{name} cannot be {value!r}")
    if option.choices and value is not None and value not in option.choices:
        raise UsageError(f"--{name} {value}: choose from {', '.join(option.choices)}")
    if value is None or not option.bounds:
        return
    if not option.holds(value):
        raise UsageError(f"--{name} must be {option.bounds}, got {value}")
    if not math.isfinite(value):
        raise UsageError(f"--{name} must be finite, got {value}")
    if isinstance(value, int) and value >= 2**32:
        raise UsageError(f"--{name} must be below 2^32, got {value}")


def kinds_of(kind: type | UnionType) -> list[type]:
    """The plain types that a field's type consists of: `tuple[str, ...] | None` is tuple and None's type."""
    parts = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return [get_origin(one) or one for one in parts]


def is_of_type(value, kind: type | UnionType) -> bool:
    """Whether a value is of a field's type; an int is also a float, and text must be Unicode."""
    kinds = kinds_of(kind)
    if isinstance(value, list | tuple):
        return tuple in kinds and all(is_of_type(item, str) for item in value)
    if isinstance(value, str):
        return str in kinds and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return type(value) in kinds or (type(value) is int and float in kinds)


def add_flags(parser: argparse.ArgumentParser, found: Iterable[Field], groups: Collection[str] = ()) -> None:
    """Add the flags of fields to a parser, in the `groups` in this order, by default in that of the fields."""
    found = [one for one in found if one.metadata["about"].group]
    groups = groups or dict.fromkeys(one.metadata["about"].group for one in found)
    titled = {title: parser.add_argument_group(title) for title in groups}
    for one in found:
        add_flag(titled[one.metadata["about"].group], one.name, one)


def add_flag(group, name: str, one: Field) -> None:
    """Add a field's flag to an argument group under this name. Not given, it is None."""
    option = one.metadata["about"]
    how = {"default": None, "help": f"{option.help} ({option.without(one.default)})".replace("%", "%%")}
    first = kinds_of(one.type)[0]
    if first is bool:
        group.add_argument(f"--{name}", action="store_true", **how)
        return
    if option.choices:
        how["choices"] = ["auto"] * option.auto + list(option.choices)
    else:
        how["metavar"] = option.metavar or METAVARS[first]
    if first is tuple:
        how["nargs"] = "+"
    if option.const is not None:
        how |= {"nargs": "?", "const": option.const}
    group.add_argument(f"--{name}", type=option.read or (str if first is tuple else first), **how)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors take one line, and name the flag that a misspelt one may have meant."""

    def __init__(self, **how):
        formatter = partial(argparse.HelpFormatter, max_help_position=HELP_COLUMN)
        super().__init__(**{"allow_abbrev": False, "formatter_class": formatter} | how)

    def parse_args(self, args=None, namespace=None, also: Iterable[str] = ()):
        """As argparse does; `also` are other flags ("--name") that a misspelt one may have meant."""
        flags, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [*self.options(), *also]
            hints = [f"{flag}: did you mean {near}?" for flag in unknown if (near := nearest(flag, known))]
            self.error("; ".join(["unrecognized arguments: " + " ".join(unknown), *hints]))
        return flags

    def options(self) -> list[str]:
        """Every flag, as it is written."""
        return [name for action in self._actions for name in action.option_strings]

    def error(self, message: str):
        complain(f"{message} (see python {self.prog} --help)")
        self.exit(2)


def parse_request(request: type, description: str):
    """The request that the command line makes. What is in no group is given without a flag."""
    parser = Parser(description=description)
    for one in fields(request):
        about = one.metadata["about"]
        if about.group is None:
            parser.add_argument(one.name, nargs="*", help=f"{about.help} ({about.without(one.default)})")
    add_flags(parser, fields(request))
    given = {name: value for name, value in vars(parser.parse_args()).items() if value not in (None, [])}
    if missing := [one.name for one in fields(request) if one.default is MISSING and one.name not in given]:
        parser.error(f"--{missing[0]} is missing")
    return request(**given)


def nearest(flag: str, known: Iterable[str]) -> str | None:
    """The known flag that is most like `flag` ("--name", or "--name=value"), None if none is or this is no flag."""
    if not flag.startswith("-"):
        return None
    name = flag.split("=")[0].lstrip("-").lower().replace("-", "_")
    names = {one.lstrip("-").lower().replace("-", "_"): one for one in known if one.startswith("--")}
    near = [one for one in names if name == "".join(word[0] for word in one.split("_"))]  # lr
    near = near or [one for one in names if set(name.split("_")) <= set(one.split("_"))]
    near += difflib.get_close_matches(name, names, 1, cutoff=0.8 if near else 0.6)
    return names[difflib.get_close_matches(name, near, 1, cutoff=0)[0]] if near else None


def interval(text: str, steps_per_epoch: int = 1) -> tuple[int | None, float | None]:
    """The steps (100, epoch) or the minutes (10m) that a flag names; neither if it names neither."""
    text = str(text)
    if text == "epoch":
        return steps_per_epoch, None
    with suppress(ValueError):
        if text.endswith("m"):
            minutes = float(text[:-1])
            return None, minutes if 0 <= minutes < float("inf") else None
        return int(text) if int(text) > 0 else None, None
    return None, None


def ratio(text: str) -> float:
    """The type of a flag that takes a compression ratio."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return value


def ratio_or_range(text: str) -> float | tuple[float, float]:
    """The type of a flag that takes a compression ratio, or two with a hyphen between them."""
    ends = re.fullmatch(r"([\d.]+)-([\d.]+)", text)
    return (ratio(ends[1]), ratio(ends[2])) if ends else float(text)


def as_name(option: str, value) -> str:
    """A setting as a part of a folder's name: a file by its stem, a model or a dataset by the last part of its name."""
    if option == "recipe":
        return str(value)
    if value is True:
        return option
    short = re.sub("^(per_device|num|max)_|_(name_or_path|name|file|size|type)$", "", option)
    if option.endswith("_file"):
        value = Path(str(value)).stem or value
    elif option in ("model_name_or_path", "dataset_name"):
        value = Path(str(value)).name or value
    elif isinstance(value, list | tuple):
        value = "-".join(map(str, value))
    return f"{short}-{file_name(str(value))}"
