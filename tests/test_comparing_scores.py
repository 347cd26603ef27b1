"""Scores side by side: intervals, p-values, and which files are compared."""

import math
from pathlib import Path

import numpy as np
import pytest

from kv_compression.generation import comparing
from tests import made_results


def test_bootstrap_covers_the_mean():
    values = np.random.default_rng(0).normal(3, 1, size=200)
    estimate = comparing.bootstrap(values)
    assert estimate.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(200)
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.02)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.02)
    assert comparing.bootstrap([2.0]) == comparing.Estimate(2, 2, 2)
    assert math.isnan(comparing.bootstrap([]).mean)


def test_p_values_are_small_for_real_differences_and_even_for_none():
    draw = np.random.default_rng(0)
    base = draw.normal(size=60)
    assert comparing.paired_p_value(base + 0.5 + draw.normal(size=60) * 0.1, base) < 0.001
    even = [comparing.paired_p_value(base + draw.normal(size=60), base, seed) for seed in range(200)]
    assert 0.3 < np.mean(even) < 0.7
    assert np.mean(np.array(even) < 0.05) < 0.12
    assert comparing.paired_p_value([1, 2], [1, 2]) == 1


def test_few_documents_can_show_nothing():
    least = [
        comparing.least_p_value(count) for count in (1, 4, comparing.FEWEST_DOCUMENTS - 1, comparing.FEWEST_DOCUMENTS)
    ]
    assert least[:2] == [1, 0.125]
    assert least[2] > 0.05 > least[3]
    for count, expected in ((4, 0.125), (6, 0.03125)):
        assert comparing.paired_p_value(np.arange(1.0, count + 1), np.zeros(count)) == pytest.approx(expected, abs=0.01)


def scored(method: str, **changes) -> dict:
    return made_results.scores(method, count=6) | changes


def test_methods_are_compared_and_named_by_their_files_where_several_have_a_ratio():
    files = {Path(f"{name}/scores.json"): scored(name[:-1]) for name in ("kv1", "kv2", "local1")}
    lines = comparing.comparisons(files)
    both = ["kv (kv1/scores.json) − local at 0.5", "kv (kv2/scores.json) − local at 0.5"]
    assert [line.split(":")[0] for line in lines] == both
    assert all(line.count("(p = ") == len(comparing.METRICS) for line in lines)
    several = {Path(f"{name}/generation.jsonl"): scored("kv_compression") for name in ("one", "two")}
    assert list(comparing.names_of(several).values()) == ["kv_compression (one)", "kv_compression (two)"]


def test_only_what_was_scored_alike_at_one_ratio_is_compared():
    first, path, other = scored("kv"), Path("kv.jsonl"), Path("other.jsonl")
    for changes in ({"bound_ratio": 0.9}, {"documents_sha256": "x"}, {"bertscore_layer": 5}, {"fluency_model": "x"}):
        assert comparing.comparisons({path: first, other: scored("local", **changes)}) == []
    (line,) = comparing.comparisons({path: first, other: scored("full_attention", bound_ratio=0.0)})
    assert line.startswith("kv − full_attention at 0.5: rouge_l ")
    assert comparing.comparisons({path: first | {"documents_sha256": None}, other: scored("local")}) == []


def test_differences_of_few_documents_are_not_tested():
    few = scored("kv")
    few["documents"].pop("0")
    files = {Path(f"{name}.jsonl"): few | {"method": name} for name in ("kv", "local", "sink")}
    line = "differences are not tested: with 5 documents no p-value can fall below 0.0625"
    assert comparing.comparisons(files) == [line]
