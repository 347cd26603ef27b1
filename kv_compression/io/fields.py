"""The fields that the JSON files of runs, generations and scores must have, and what each may hold."""

import re
from collections.abc import Callable

NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
COMMIT = re.compile(r"[0-9a-f]{7,64}(\+changes)?")
MOST = 1.02e304  # a little above e^700, the largest perplexity: thousands of them can be summed


def is_number(value) -> bool:
    """Whether this is a number (and not a boolean)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value) -> float | None:
    """`value` if it is a number that one can calculate with, else None."""
    return value if is_number(value) and abs(value) <= MOST else None


def is_name(value) -> bool:
    """Whether this can be the name of a method or preset, or a digest."""
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def is_commit(value) -> bool:
    """Whether this is a commit as `machine.commit_of_project` names it."""
    return isinstance(value, str) and COMMIT.fullmatch(value) is not None


def is_ratio(value) -> bool:
    """Whether this is a compression ratio."""
    return is_number(value) and 0 <= value < 1


def is_protocol(value) -> bool:
    """Whether this names a protocol."""
    return value in ("paper", "matched")


def is_object(value) -> bool:
    """Whether this is a JSON object."""
    return isinstance(value, dict)


def is_count(value) -> bool:
    """Whether this is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_counts(value) -> bool:
    """Whether this maps names to counts."""
    return is_object(value) and all(map(is_count, value.values()))


def is_measured(value) -> bool:
    """Whether this is a number, or null, which stands for infinity and NaN."""
    return value is None or is_number(value)


def is_estimate(value) -> bool:
    """Whether this is a mean with its interval, or all three are null."""
    if not is_object(value) or value.keys() != {"mean", "low", "high"}:
        return False
    return all(map(is_number, value.values())) or all(part is None for part in value.values())


def is_scores_by_document(value) -> bool:
    """Whether this maps documents to metrics to numbers."""
    return is_object(value) and all(
        is_object(found) and all(number(score) is not None for score in found.values()) for found in value.values()
    )


def is_about_recall(value) -> bool:
    """Whether this says which method was asked what it remembers."""
    return is_object(value) and is_name(value.get("method"))


def is_recall(value) -> bool:
    """Whether these are the rows of a recall.json."""
    return isinstance(value, list) and all(is_object(row) and not wrong(row, OF_ROWS, MAYBE_OF_ROWS) for row in value)


Fields = dict[str, Callable[[object], bool]]

OF_A_RUN: Fields = {
    "method": is_name,
    "bound_ratio": is_ratio,
    "protocol": is_protocol,
    "preset": is_name,
    "seed": is_count,
    "perplexity": is_measured,
    "removed_fraction": is_measured,
    "settings": is_object,
}
SOMETIMES_OF_A_RUN: Fields = {"untrained": is_object, "commit": is_commit}
OF_A_METHOD: Fields = {"method": is_name, "bound_ratio": is_ratio, "protocol": is_protocol}
OF_A_GENERATION: Fields = OF_A_METHOD | {"preset": is_name, "documents_sha256": is_name}
OF_SCORES: Fields = {
    "documents": is_scores_by_document,
    "rouge_l": is_estimate,
    "bertscore": is_estimate,
    "perplexity": is_estimate,
}
OF_ROWS: Fields = {"task": is_name, "ratio": is_ratio, "documents": is_count, "left": is_count}
MAYBE_OF_ROWS: Fields = dict.fromkeys(
    ("length", "kept", "none", "nats", "full", "recovered", "low", "high", "exact", "exact_full"),
    lambda value: number(value) is not None,
)
OF_RECALL: Fields = {"about": is_about_recall, "rows": is_recall}


def has_all(content, fields: Fields) -> bool:
    """Whether this is an object that has these fields, with any values."""
    return is_object(content) and all(name in content for name in fields)


def wrong(content: dict, needed: Fields, sometimes: Fields | None = None) -> list[str]:
    """The names of the fields with wrong values; those in `sometimes` may be null or missing."""
    found = {name: fits for name, fits in (sometimes or {}).items() if content.get(name) is not None}
    return [name for name, fits in (needed | found).items() if not fits(content.get(name))]


def check(content: dict, needed: Fields, sometimes: Fields | None = None) -> None:
    """Raise ValueError, naming them, if there are `wrong` fields."""
    if named := ", ".join(wrong(content, needed, sometimes)):
        raise ValueError(f"is damaged: {named}")
