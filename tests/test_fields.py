import math

import pytest

from kv_compression.io import fields


@pytest.mark.parametrize("value", [True, "1", None, [], math.nan, math.inf, 10**400, 1.7e308])
def test_what_cannot_be_reckoned_with_is_no_number(value):
    assert fields.number(value) is None


def test_numbers():
    assert [fields.number(value) for value in (0, -1.5, math.exp(700))] == [0, -1.5, math.exp(700)]


@pytest.mark.parametrize(
    ("fits", "good", "bad"),
    [
        (fields.is_name, ["kv_compression", "0.1-a"], ["", "a b", "a|b", "é", "a\n", "x" * 101, 1, None]),
        (fields.is_ratio, [0, 0.0, 0.99], [1, -0.1, math.nan, True, "0.5", None]),
        (fields.is_protocol, ["paper", "matched"], ["own", None, [], {}]),
        (fields.is_count, [0, 7], [-1, True, 1.0, "1", None]),
        (fields.is_counts, [{}, {"a": 0}], [{"a": -1}, [], None]),
        (fields.is_measured, [1, 1.5, None, 1.7e308], ["1", True, [], {}]),
        (
            fields.is_estimate,
            [{"mean": 1, "low": 0, "high": 2}, dict.fromkeys(("mean", "low", "high"))],
            [{"mean": 1, "low": 0}, {"mean": 1, "low": None, "high": 2}, {"mean": "1", "low": 0, "high": 2}, [], None],
        ),
        (
            fields.is_scores_by_document,
            [{}, {"0": {}}, {"0": {"rouge_l": 0.5}}],
            [{"0": {"rouge_l": None}}, {"0": 1}, {"0": {"rouge_l": "x"}}, []],
        ),
    ],
)
def test_what_fields_may_hold(fits, good, bad):
    assert all(map(fits, good))
    assert not any(map(fits, bad))


def test_wrong_fields_are_named():
    fields.check({"method": "x", "untrained": None}, {"method": fields.is_name}, fields.SOMETIMES_OF_A_RUN)
    with pytest.raises(ValueError, match="is damaged: method, untrained"):
        fields.check({"untrained": 1}, {"method": fields.is_name}, fields.SOMETIMES_OF_A_RUN)
