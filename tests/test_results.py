import json
import math

import pytest

from kv_compression.io import ownership, results
from kv_compression.io.errors import RunError

RUN = {
    "method": "kv_compression",
    "bound_ratio": 0.5,
    "protocol": "matched",
    "preset": "embedded",
    "seed": 0,
    "perplexity": 12.345,
    "removed_fraction": 0.5,
    "attended_fraction": 0.6,
    "num_targets": 100,
    "untrained": {"perplexity": 99.5},
    "wall_seconds": 61.2,
    "settings": {},
}


def test_results_are_written_whole_and_read_back(tmp_path):
    results.write_json(tmp_path / "new" / results.RESULTS, RUN | {"extra": [math.inf, {"nan": math.nan}]})
    assert results.read_results(tmp_path / "new") == RUN | {"extra": [None, {"nan": None}]}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [ownership.LIST, results.RESULTS]


def test_a_failed_write_leaves_the_old_results(tmp_path, monkeypatch):
    results.write_json(tmp_path / results.RESULTS, RUN)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(RunError, match="No space left"):
        results.write_json(tmp_path / results.RESULTS, RUN | {"seed": 1})
    assert results.read_results(tmp_path) == RUN
    assert sorted(path.name for path in tmp_path.iterdir()) == [ownership.LIST, results.RESULTS]


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff", b"[" * 100000, json.dumps({"method": "x"}).encode()])
def test_what_is_not_results_is_named(tmp_path, content):
    (tmp_path / results.RESULTS).write_bytes(content)
    with pytest.raises(RunError, match=r"results\.json"):
        results.read_results(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "a|b"},
        {"bound_ratio": 1},
        {"seed": "0"},
        {"settings": []},
        {"untrained": 3},
        {"protocol": {}},
        {"commit": "a|b"},
    ],
)
def test_results_with_other_fields_are_named(tmp_path, wrong):
    (tmp_path / results.RESULTS).write_text(json.dumps(RUN | wrong))
    with pytest.raises(RunError, match=f"results.json is damaged: {next(iter(wrong))}"):
        results.read_results(tmp_path)


def test_no_results(tmp_path):
    assert results.read_results(tmp_path) is None


def test_summary_and_table_state_what_was_measured():
    line = results.in_one_line(RUN)
    assert "\n" not in line
    for part in ("kv_compression at ratio 0.5", "12.35", "before fine-tuning 99.50", "removed 0.500", "embedded"):
        assert part in line
    assert "without fine-tuning" in results.in_one_line(RUN | {"eval_only": True})
    lines = results.table([RUN, RUN | {"method": "full_attention", "perplexity": None}]).splitlines()
    assert [line.split()[0] for line in lines] == ["method", "kv_compression", "full_attention"]
    assert lines[1].split() == ["kv_compression", "0.5", "0.500", "0.600", "12.35", "99.50", "61"]
    assert lines[2].split()[4] == "-"
    assert len({len(line) for line in lines}) == 1
    several = [RUN | {"seed": seed, "untrained": None, "kept_keys_mean": 64.04} for seed in (0, 1)]
    several[1]["settings"] = {"recipe": "best"}
    lines = [line.split() for line in results.table(several).splitlines()]
    assert lines[0] == ["method", "ratio", "seed", "removed", "attended", "kept", "perplexity", "seconds"]
    assert lines[1] == ["kv_compression", "0.5", "0", "0.500", "0.600", "64.0", "12.35", "61"]
    assert lines[2][:3] == ["kv_compression,", "recipe", "best"]
    assert "before fine-tuning" not in results.in_one_line(several[0])
