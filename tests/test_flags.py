import math

import pytest

from kv_compression.io.errors import UsageError
from kv_compression.io.flags import Option, check, is_of_type, nearest


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--bound_raito", "--bound_ratio"),
        ("--Ratio", "--bound_ratio"),
        ("--epochs", "--num_train_epochs"),
        ("--learning_rte", "--learning_rate"),
        ("--xyz", None),
        ("0.5", None),
    ],
)
def test_the_nearest_flag(flag, meant):
    known = ["-h", "--help", "--bound_ratio", "--num_train_epochs", "--learning_rate", "--method"]
    assert nearest(flag, known) == meant


@pytest.mark.parametrize(
    ("option", "good", "bad", "words"),
    [
        (Option(least=1), [1, 1.5], [0, -1, math.nan], "must be at least 1, got"),
        (Option(above=0), [1e-9], [0, -1.0, math.nan], "must be above 0, got"),
        (Option(least=0, below=1), [0, 0.99], [1, -0.1, math.nan, math.inf], "must be at least 0 and below 1, got"),
        (Option(least=1, most=99), [1, 99], [0, 100], "must be from 1 to 99, got"),
        (Option(least=0), [0], [math.inf], "must be finite"),
        (Option(least=0), [2**32 - 1], [2**32], "must be below 2.32"),
        (Option(), [math.inf, -1, None], ["1", True, []], "cannot be"),
    ],
)
def test_bounds(option, good, bad, words):
    for value in good:
        check("x", value, float | None, option)
    for value in bad:
        with pytest.raises(UsageError, match=f"--x {words}"):
            check("x", value, float | None, option)


def test_values_are_of_their_types():
    for kind, good, bad in [
        (int, [1], [1.0, True, "1", None]),
        (float, [1, 1.0], [True, "1"]),
        (bool, [True], [1, None]),
        (str | None, ["é", None], ["\udcff", 1, ["a"]]),
        (tuple[str, ...] | None, [("a",), ["a"], None], ["a", ("a", 1), ("\udcff",)]),
    ]:
        assert all(is_of_type(value, kind) for value in good)
        assert not any(is_of_type(value, kind) for value in bad)
