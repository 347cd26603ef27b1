"""report.py on results that are made here."""

import csv
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kv_compression.io import ownership
from kv_compression.io.errors import UsageError
from kv_compression.reporting import collecting, comparing, published, writing
from tests.made_results import grid, group_of, results, scores, write

ROOT = Path(__file__).parent.parent


def text_of(folder: Path, *contents: dict) -> str:
    return "\n".join(writing.build(collecting.collect(write(folder, *contents))).lines)


def test_runs_are_grouped_by_what_must_be_equal(tmp_path):
    same = [results(), results("local_attention"), results(seed=1), results(protocol="paper"), results(sink_tokens=4)]
    same += [results(ratio=0.1, attn_implementation="eager", fixed_spans=False, recipe="best")]
    other = [results(learning_rate=1.0), results("full_attention", 0.0, learning_rate=1.0)]
    groups = collecting.collect(write(tmp_path, *same, *other)).groups
    assert [len(group.runs) for group in groups] == [6, 2]
    assert groups[1].settings["learning_rate"] == 1.0
    text = text_of(tmp_path)
    assert "Claim 1, group 2: tiny on test.txt" in text
    assert "report_1_measured.png" in text
    assert "report_2_measured.png" not in text  # no two points of anything


def test_old_files_lack_what_was_not_recorded_yet(tmp_path):
    old = results("local_attention")
    for name in ("kept_keys_mean", "kept_keys_max", "nll_per_batch", "nll_per_token", "attended_fraction", "untrained"):
        del old[name]
    new = results(sink_tokens=0, cr_tokens=1, cr_visibility="span", distill_weight=0.0, max_eval_blocks=None)
    group = group_of(tmp_path, old, new)
    assert [run.variant for run in group.runs] == ["", ""]
    row = next(row for row in comparing.describe(group, "matched") if row["method"] == "local_attention")
    assert row["perplexity"] == pytest.approx(old["perplexity"])
    assert row["kept_keys_mean"] is None
    assert "| local attention | 0.5 | 1 | 0.500 | - | - | - |" in text_of(tmp_path)


def test_methods_without_sentinels_serve_both_protocols(tmp_path):
    group = group_of(tmp_path, results(protocol="paper"), results("local_attention"), results("full_attention", 0.0))
    found = {point.method: point for point in collecting.points(group, "paper")}
    assert found.keys() == {"kv_compression", "local_attention", "full_attention"}
    assert found["local_attention"].nlls[0] == group.runs[1].content["nll_per_batch"]
    assert not collecting.select(collecting.points(group, "matched"), "kv_compression")
    own = results("local_attention", protocol="paper", nll=1.0)
    group = group_of(tmp_path, results(protocol="paper"), results("local_attention"), own)
    assert collecting.select(collecting.points(group, "paper"), "local_attention")[0.5].nlls[0] == pytest.approx(1.001)


@pytest.mark.parametrize(
    "settings, variant",
    [
        ({"sink_tokens": 4, "recent_tokens": 12}, "sinks 4, window 12"),
        ({"span_sampler": "self_information", "span_unit": "phrase"}, "self-information sampler, by phrase"),
        ({"cr_tokens": 2, "distill_weight": 0.5}, "2 CR tokens, distilled 0.5"),
        ({"max_span_length": 8, "cr_visibility": "context"}, "CR sees context, spans to 8"),
        ({"fixed_spans": True, "eval_only": True}, "spans drawn once, not fine-tuned"),
        ({"max_span_length": 25, "sink_tokens": 0, "span_unit": "token", "distill_weight": 0}, ""),
    ],
)
def test_a_variant_is_named_by_what_is_not_plain(settings, variant):
    assert collecting.variant_of(results(**settings)) == variant


def test_settings_of_spans_make_no_variant_of_a_method_without_them():
    assert collecting.variant_of(results("local_attention", max_span_length=8, fixed_spans=True)) == ""
    assert collecting.variant_of(results("sink_attention", sink_tokens=4)) == ""
    assert collecting.variant_of(results("sink_attention", sink_tokens=1)) == "sinks 1"
    assert collecting.variant_of(results(protocol="paper", fixed_spans=True)) == ""


FOR_ALL_METHODS = [{"isolate_documents": True}, {"position_ids_by_document": True}, {"distill_weight": 0.5}]
FOR_ALL_METHODS += [{"max_span_length": 8}, {"fixed_spans": True}, {"distill_weight": 0.5, "max_span_length": 8}]


@pytest.mark.parametrize("flags", FOR_ALL_METHODS)
def test_a_sweep_with_a_flag_for_all_methods_is_judged_by_itself(tmp_path, flags):
    plain = grid(("kv_compression", "local_attention"), seeds=(0,), protocols=("paper", "matched"))
    other = [run | {"nll_per_token": run["nll_per_token"] + 1, "settings": run["settings"] | flags} for run in plain]
    alone = group_of(tmp_path / "alone", *other)
    assert {point.variant for point in collecting.points(alone, "matched")} == {""}
    assert [row["verdict"] for row in comparing.judge_claim_1(alone, "matched")] == ["holds"] * 9
    assert comparing.judge_kept_keys(alone, "matched")
    assert not any(line.startswith(("KV", "local")) for line in comparing.missing(alone))
    both = collecting.collect(write(tmp_path / "both", *other, *plain, results(sink_tokens=4, **flags)))
    lost = 9 if flags == {"fixed_spans": True} else 0  # the protocol paper draws spans once anyhow: these are the same
    assert [len(group.runs) for group in both.groups] == [29 - lost, 28]
    assert len(both.duplicates) == lost
    assert [run.variant for group in both.groups for run in group.runs if run.variant] == ["sinks 4"]
    for name, value in flags.items():
        assert [group.settings.get(name) == value for group in both.groups] == [True, False]


def test_a_variant_alone_with_such_a_flag_stays_beside_the_plain_methods(tmp_path):
    variants = [results(distill_weight=0.5), results(max_span_length=50, sink_tokens=1), results(fixed_spans=True)]
    group = group_of(tmp_path, results(), results("full_attention", 0.0), results("sink_attention"), *variants)
    found = [run.variant for run in group.runs if run.variant]
    assert found == ["distilled 0.5", "sinks 1, spans to 50", "spans drawn once"]
    rows = {row["variant"]: row for row in comparing.describe(group, "matched")}
    assert all(rows[variant]["nats_above_full"] is not None for variant in found)
    (group,) = collecting.collect(write(tmp_path / "kv", *variants, results(ratio=0.1))).groups
    assert [run.variant for run in group.runs] == [*found, ""]


def test_what_an_older_version_did_not_know_makes_no_group(tmp_path):
    assert len(group_of(tmp_path, results(), results(seed=1, num_processes=1, isolate_documents=False)).runs) == 2
    assert len(group_of(tmp_path, results(), results(seed=1, documents="auto", spacy_model=None)).runs) == 2


def test_runs_with_the_published_schedule_are_a_group_of_their_own(tmp_path):
    """Older runs of the protocol paper had the sane one, and do not say so."""
    old, new = results(protocol="paper"), results(protocol="paper", nll=2.0, published_schedule=True)
    found = collecting.collect(write(tmp_path, old, new, results(), results(published_schedule=False, seed=1)))
    assert found.duplicates == []
    assert [len(group.runs) for group in found.groups] == [3, 1]
    assert [group.settings.get("published_schedule") for group in found.groups] == [None, True]


def test_variants_stay_off_the_plain_curve_and_have_their_own_table(tmp_path):
    runs = [results(nll=3.5), results(nll=1.0, sink_tokens=4), results("full_attention", 0.0, nll=3.0)]
    runs += [results("full_attention", 0.0, nll=0.5, eval_only=True), results(nll=2.0, eval_only=True)]
    group = group_of(tmp_path, *runs)
    assert collecting.select(collecting.points(group, "matched"), "kv_compression")[0.5].nlls == {0: 3.5}
    rows = {row["variant"]: row for row in comparing.describe(group, "matched") if row["method"] == "kv_compression"}
    assert rows["sinks 4"]["nats_above_full"] == -2.0
    assert rows["not fine-tuned"]["nats_above_full"] == 1.5  # against a model that was not either
    assert "| 1 | KV compression | sinks 4 | 0.5 |" in text_of(tmp_path).split("### Variants")[1]


def test_a_run_without_fine_tuning_is_the_untrained_column_not_a_curve(tmp_path):
    tuned = results("local_attention", nll=3.0) | {"untrained": None}
    group = group_of(tmp_path, tuned, results("local_attention", nll=6.0, eval_only=True), results())
    plain, untrained = (row for row in comparing.describe(group, "matched") if row["method"] == "local_attention")
    assert (plain["perplexity"], plain["untrained_perplexity"]) == pytest.approx((math.exp(3), math.exp(6)))
    assert (untrained["variant"], untrained["fine_tuned"]) == ("not fine-tuned", False)


def test_mean_and_spread_over_seeds(tmp_path):
    nlls = np.array([3.0, 3.3, 3.1])
    runs = [results(seed=seed, nll=nll) for seed, nll in enumerate(nlls)]
    runs += [
        results("local_attention", seed=seed, nll=nll + gap) for seed, (nll, gap) in enumerate(zip(nlls, (1, 2, 4)))
    ]
    group = group_of(tmp_path, *runs)
    row = comparing.describe(group, "matched")[0]
    assert row["perplexity"] == pytest.approx(np.exp(nlls).mean())
    assert row["perplexity_spread"] == pytest.approx(np.exp(nlls).std(ddof=1))
    (judged,) = comparing.judge_claim_1(group, "matched")
    gaps = np.array([-1, -2, -4])
    half = 4.303 * gaps.std(ddof=1) / math.sqrt(3)  # Student's t, two degrees of freedom
    assert (judged["difference"], judged["spread"]) == pytest.approx((gaps.mean(), gaps.std(ddof=1)))
    assert (judged["low"], judged["high"]) == pytest.approx((gaps.mean() - half, gaps.mean() + half))


def test_differences_are_of_equal_seeds():
    assert comparing.difference({0: 1.0, 1: 2.0}, {1: 5.0, 2: 9.0}).values == (-3.0,)
    assert comparing.difference({0: 1.0}, {1: 5.0}) is None


def test_one_seed_has_no_spread(tmp_path):
    text = text_of(tmp_path, results(), results("local_attention"))
    assert "One seed: no spread over seeds." in text
    assert "| one seed |" in text


@pytest.mark.parametrize(
    "values, verdict",
    [
        ((0.04,), "holds"),
        ((0.06,), "fails"),
        ((-0.5, -0.51), "holds"),
        ((0.04, -0.1), "holds, uncertain"),
        ((0.5, 0.0), "fails, uncertain"),
    ],
)
def test_holds_means_at_most_1_05_times_the_perplexity(values, verdict):
    assert comparing.Difference(values).verdict == verdict


def test_verdicts_follow_the_numbers(tmp_path):
    before = text_of(tmp_path / "a", results(nll=3.0), results("local_attention", nll=3.2))
    after = text_of(tmp_path / "b", results(nll=3.3), results("local_attention", nll=3.2))
    line = "- against local attention: {} at 0.5; 1 of 9 ratios measured; not measured: 0.1 – 0.4, 0.6 – 0.9."
    assert line.format("holds") + " Its perplexity is 0.82 times" in before
    assert line.format("fails") + " Its perplexity is 1.11 times" in after
    both = text_of(tmp_path / "c", *grid(("kv_compression", "local_attention", "scattered_attention"), (0.1, 0.9)))
    assert "- against both local and scattered attention: holds at 0.1, 0.9; measured at 0.1, 0.9." in both
    nominal = both.split("**Nominal**")[1].split("**Matched**")[0]
    assert "- against local attention: 0 of 9 ratios measured; not measured: 0.1 – 0.9." in nominal


def test_kept_keys_are_interpolated_inside_the_measured_range_only(tmp_path):
    sinks = [results("sink_attention", ratio, nll=nll, kept=kept) for ratio, nll, kept in ((0.5, 3, 60), (0.9, 4, 20))]
    runs = [results(ratio=ratio, kept=kept) for ratio, kept in ((0.1, 100.0), (0.5, 50.0), (0.7, 20.0), (0.9, 19.0))]
    group = group_of(tmp_path, *sinks, *runs, results(seed=1, kept=50.0))
    rows = comparing.judge_kept_keys(group, "matched")
    assert [(row["ratio"], row["seeds"]) for row in rows] == [(0.5, 1), (0.7, 1)]
    assert rows[0]["baseline_perplexity"] == pytest.approx(math.exp(3.25))
    assert (rows[0]["baseline_kept_below"], rows[0]["baseline_kept_above"]) == (20, 60)
    assert rows[1]["baseline_perplexity"] == pytest.approx(math.exp(4))
    assert writing.interpolated(rows[0], "baseline") == f"≈ {math.exp(3.25):.2f} (20.0 – 60.0)"
    assert writing.interpolated(rows[1], "baseline") == f"{math.exp(4):.2f}"  # measured just there
    described = {row["ratio"]: row for row in comparing.describe(group, "matched") if row["method"] == "kv_compression"}
    assert described[0.5]["sink_perplexity"] == pytest.approx(math.exp(3.25))
    assert described[0.9]["sink_perplexity"] is described[0.1]["sink_perplexity"] is None


def test_a_seed_that_was_measured_at_few_ratios_is_not_interpolated_over_a_wider_gap(tmp_path):
    whole = [
        results("sink_attention", nll=n, kept=k, ratio=r) for r, n, k in ((0.5, 3, 60), (0.7, 3.2, 40), (0.9, 4, 20))
    ]
    ends = [results("sink_attention", seed=1, nll=n, kept=k, ratio=r) for r, n, k in ((0.5, 3, 60), (0.9, 4, 21))]
    kv = [results(nll=3.5, kept=30, seed=seed) for seed in (0, 1)]
    group = group_of(tmp_path, *whole, *ends, *kv)
    (row,) = comparing.judge_kept_keys(group, "matched")
    assert row["seeds"] == 1 and row["baseline_perplexity"] == pytest.approx(math.exp(3.6))
    assert (row["baseline_kept_below"], row["baseline_kept_above"]) == (20, 40)
    near = [results("sink_attention", seed=1, nll=3.2, kept=41, ratio=0.7)]
    (row,) = comparing.judge_kept_keys(group_of(tmp_path / "both", *whole, *ends, *near, *kv), "matched")
    assert row["seeds"] == 2 and (row["baseline_kept_below"], row["baseline_kept_above"]) == (20, 41)


def test_an_exact_hit_or_finer_runs_of_one_seed_do_not_leave_out_another_on_the_grid(tmp_path):
    grid = [
        results("sink_attention", ratio, seed=seed, nll=10 - kept / 10, kept=kept)
        for seed in (0, 1)
        for ratio, kept in ((0.7, 40), (0.8, 30), (0.9, 20))
    ]
    finer = [
        results("sink_attention", ratio, nll=10 - kept / 10, kept=kept) for ratio, kept in ((0.84, 26), (0.85, 25))
    ]
    others = [
        results("sink_attention", 0.86, seed=2, nll=7.6, kept=24),
        results("sink_attention", 0.85, seed=2, kept=26),
    ]
    runs = [results(seed=seed, nll=8, kept=25) for seed in (0, 1)]
    (row,) = comparing.judge_kept_keys(group_of(tmp_path, *grid, *finer, *others, *runs), "matched")
    assert row["seeds"] == 2 and row["baseline_perplexity"] == pytest.approx(math.exp(7.5))
    assert (row["baseline_kept_below"], row["baseline_kept_above"]) == (20, 30)


def test_the_best_sinks_are_those_that_a_point_compares_worst_with(tmp_path):
    sinks = [results("sink_attention", ratio, nll=nll, kept=kept) for ratio, nll, kept in ((0.5, 3, 60), (0.9, 4, 20))]
    one = {"sink_tokens": 1}
    sinks += [
        results("sink_attention", ratio, nll=nll, kept=kept, **one)
        for ratio, nll, kept in ((0.5, 3, 50), (0.9, 3.2, 30))
    ]
    sinks += [results("sink_attention", 0.5, nll=0.1, kept=40, sink_tokens=2)]
    variants = [results(nll=3.3, kept=40.0, recent_tokens=1), results(ratio=0.9, nll=3.3, kept=55.0, recent_tokens=2)]
    variants += [results(ratio=0.9, nll=3.3, kept=70.0, recent_tokens=3)]
    group = group_of(tmp_path, *sinks[:4], results(kept=40.0), *variants)
    rows = {row["number"]: row for row in comparing.describe(group, "matched")}
    assert rows[1]["difference_to_sink"] == pytest.approx(3.3 - 3.5)
    assert rows[1]["difference_to_best_sink"] == pytest.approx(3.3 - 3.1)
    assert (rows[1]["best_sink_variant"], rows[1]["best_sink_kept_below"]) == ("sinks 1", 30)
    assert rows[1]["best_sink_perplexity"] == pytest.approx(math.exp(3.1))
    assert rows[2]["best_sink_variant"] == ""  # out of reach of the other
    assert rows[3]["best_sink_variant"] is rows[3]["difference_to_best_sink"] is None
    text = text_of(tmp_path)
    assert f"| ≈ {math.exp(3.5):.2f} (20.0 – 60.0) | ≈ {math.exp(3.1):.2f} (30.0 – 50.0), sinks 1 |" in text
    assert "- with 4 sinks: 1 of 2 that could be compared, of 3 measured: no. 1 at 0.5 (-0.200 nats)." in text
    assert "- with as many sinks as are best there: 0 of 2 that could be compared, of 3 measured." in text
    group = group_of(tmp_path, *sinks, *variants)  # a single run with two sinks holds just as many keys
    assert comparing.describe(group, "matched")[0]["best_sink_variant"] == "sinks 2"


def answers(rows, **which) -> dict:
    return {row["question"]: row for row in rows if all(row[name] == value for name, value in which.items())}


def test_what_the_variants_come_to(tmp_path):
    sinks = [results("sink_attention", ratio, nll=3.9, kept=kept) for ratio, kept in ((0.1, 100), (0.9, 10))]
    sinks += [run | {"nll_per_token": 3.6, "settings": run["settings"] | {"sink_tokens": 1}} for run in sinks]
    runs = [results("full_attention", 0.0, nll=3.0), results(ratio=0.9, nll=4.0, kept=30), *sinks]
    runs += [
        results(ratio=0.9, nll=3.45, kept=120, recent_tokens=9),
        results(ratio=0.9, nll=3.55, kept=20, recent_tokens=5),
    ]
    runs += [results(ratio=0.5, nll=3.12, kept=60, recent_tokens=9), results(ratio=0.7, nll=3.2, recent_tokens=9)]
    rows = comparing.beyond(group_of(tmp_path, *runs))
    lowest = answers(rows, ratio=0.9, choice="lowest perplexity")
    assert (lowest["gap"]["variant"], lowest["gap"]["variants"]) == ("window 9", 2)
    assert (lowest["gap"]["value"], lowest["gap"]["verdict"]) == (pytest.approx(0.45), "met")
    assert lowest["sink"]["value"] is lowest["best_sink"]["value"] is None  # holds more keys than any run with sinks
    assert lowest["sink"]["verdict"] == lowest["best_sink"]["verdict"] == "not measured"
    assert (lowest["full"]["value"], lowest["full"]["verdict"]) == (pytest.approx(math.exp(0.45)), "no aim")
    against = answers(rows, ratio=0.9, choice="best against sink attention")
    assert against["gap"]["verdict"] == "not met"
    assert (against["sink"]["value"], against["sink"]["verdict"]) == (pytest.approx(math.exp(-0.35)), "met")
    assert (against["best_sink"]["value"], against["best_sink"]["verdict"]) == (
        pytest.approx(math.exp(-0.05)),
        "not met",
    )
    half = answers(rows, ratio=0.5)
    assert (half["gap"]["value"], half["gap"]["verdict"]) == (None, "not measured")  # the plain method was not run
    assert [half[name]["verdict"] for name in ("sink", "best_sink", "full")] == ["met", "met", "met"]
    assert all(
        row["aim"] is None and row["verdict"] in ("no aim", "not measured") for row in rows if row["ratio"] == 0.7
    )
    text = text_of(tmp_path).split("## Beyond the paper")[1]
    assert "### At 0.9 removed, group 1: 2 variants of tiny measured" in text
    assert (
        "- nats above full attention as a share of the plain method's: 0.45 (+0.450 of +1.000). Aim: at most 0.50. Met."
        in text
    )
    assert "- against sink attention with 4 sinks at 120.0 kept keys: not measured. Aim: at most 0.75.\n" in text
    assert "- against full attention: 1.13 times, 22.65 to 20.09. Aim: at most 1.15. Met." in text
    assert "No variant was run." in text_of(tmp_path / "none", results(), results("local_attention"))


def test_what_seeds_leave_open_is_told(tmp_path):
    runs = [results("full_attention", 0.0, nll=3.0, seed=seed) for seed in range(3)]
    runs += [results(nll=nll, seed=seed, recent_tokens=5) for seed, nll in enumerate((3.0, 3.1, 3.2))]
    (full,) = [row for row in comparing.beyond(group_of(tmp_path, *runs)) if row["question"] == "full"]
    assert (full["value"], full["verdict"]) == (pytest.approx(math.exp(0.1)), "met, uncertain")


def test_missing_runs_are_listed(tmp_path):
    runs = [run for run in grid(seeds=(0, 1), protocols=("paper", "matched"))]
    assert comparing.missing(group_of(tmp_path / "full", *runs)) == []
    gone = {
        ("kv_compression", "paper", 0.5, 1),
        ("local_attention", "matched", 0.1, 0),
        ("full_attention", "matched", 0.0, 1),
    }
    gone |= {("kv_compression", "paper", ratio, 0) for ratio in (0.2, 0.3, 0.4, 0.9)}
    left = [run for run in runs if tuple(run[k] for k in ("method", "protocol", "bound_ratio", "seed")) not in gone]
    assert comparing.missing(group_of(tmp_path / "part", *left)) == [
        "full attention, paper and matched, seed 1: 0",
        "KV compression, paper, seed 0: 0.2 – 0.4, 0.9",
        "KV compression, paper, seed 1: 0.5",
        "local attention, paper and matched, seed 0: 0.1",
    ]


def test_duplicates_are_used_once(tmp_path):
    group = group_of(tmp_path, results(nll=1.0), results(nll=2.0))
    assert [run.content["nll"] for run in group.runs] == [1.0]
    assert "- 001/results.json: 000/results.json is used" in text_of(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100000,
        b'{"loss": 1}',
        json.dumps(results(ratio=math.nan) | {"settings": 3}).encode(),
        json.dumps(results(protocol="own")).encode(),
        json.dumps(scores("kv_compression", documents={"0": 3})).encode(),
    ],
)
def test_what_cannot_be_read_is_named_and_stops_nothing(tmp_path, content):
    write(tmp_path, results())
    (tmp_path / "x|y.json").write_bytes(content)
    found = collecting.collect(tmp_path)
    assert [path for path, _ in found.unreadable] == ["x|y.json"]
    (line,) = [line for line in writing.build(found).lines if line.startswith("- x\\|y.json")]
    assert "\n" not in line
    assert str(tmp_path) not in line


def test_files_of_other_programs_are_passed_over(tmp_path):
    write(tmp_path, results())
    names = ["adapter_config.json", "tokenizer_config.json", "special_tokens_map.json", "generation.about.json"]
    for name in [*names, "untrained.json", ".results.json.x1.partial"]:
        (tmp_path / name).write_text("{}")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "some.json").write_text("{")
    (tmp_path / "kv_0.1.json").write_text(json.dumps(results(ratio=0.1)))  # results by another name
    found = collecting.collect(tmp_path)
    assert found.unreadable == []
    assert [run.path for run in found.groups[0].runs] == ["000/results.json", "kv_0.1.json"]


def test_text_of_files_stays_in_its_place(tmp_path):
    names = {"model_name_or_path": "a|b\n# c `d` <e> ](f)\\", "cr_visibility": "x|y\r\nz"}
    write(tmp_path, results() | {"device": "gpu\n1,2"}, results(**names), results("local_attention", **names))
    (tmp_path / os.fsdecode(b"\xff|\n")).mkdir()
    shutil.copy(tmp_path / "000" / "results.json", tmp_path / os.fsdecode(b"\xff|\n") / "results.json")
    text = writing.write(collecting.collect(tmp_path), tmp_path / "out").read_text(encoding="utf-8")
    assert "group 2: a\\|b # c 'd' &lt;e> ]\\(f)\\\\ on test.txt" in text
    assert "CR sees x\\|y z" in text
    assert "\n- \\\\xff\\| /results.json: 000/results.json is used\n" in text
    lines = (tmp_path / "out" / "report_runs.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 3
    assert '"gpu 1,2"' in lines[1]


def test_infinite_and_missing_numbers_are_dashes(tmp_path):
    lost = results() | dict.fromkeys(("perplexity", "nll", "nll_per_token", "nll_per_batch"))
    text = text_of(tmp_path, lost, results("local_attention"), results("full_attention", 0.0))
    assert "KV compression, matched, seed 0: 0.1 – 0.9" in text


def test_scores_are_judged_document_by_document(tmp_path):
    runs = [scores("kv_compression", better=0.05), scores("local_attention")]
    rows = {
        row["metric"]: row
        for row in comparing.judge_claim_2(collecting.collect(write(tmp_path, *runs)).scores[0], "matched")
    }
    assert {metric: row["verdict"] for metric, row in rows.items()} == dict.fromkeys(collecting.METRICS, "holds")
    ours, theirs = (np.array([d["rouge_l"] for d in one["documents"].values()]) for one in runs)
    assert rows["rouge_l"]["difference"] == pytest.approx((ours - theirs).mean())
    assert rows["rouge_l"]["low"] < rows["rouge_l"]["difference"] < rows["rouge_l"]["high"]
    assert "- ROUGE-L: holds at 0.5; 1 of 9 ratios measured" in text_of(tmp_path)
    worse = text_of(tmp_path, scores("kv_compression", better=-0.05), scores("local_attention"))
    assert "- ROUGE-L: reversed at 0.5" in worse
    assert "- perplexity: reversed at 0.5" in worse
    same = text_of(tmp_path, scores("kv_compression"), scores("local_attention"))
    assert "- BERTScore: no difference shown at 0.5" in same


def test_missing_continuations_are_listed(tmp_path):
    write(tmp_path, results(seed=3), results("local_attention", seed=3), results(ratio=0.9, seed=4))
    for number, score in enumerate(
        (scores("kv_compression"), scores("local_attention"), scores("kv_compression", 0.9))
    ):
        (tmp_path / f"{number:03}" / "scores.json").write_text(json.dumps(score))
    for name in ("000/generation", "001/generation", "001/other"):
        (tmp_path / f"{name}.about.json").write_text("{}")
    found = collecting.collect(tmp_path)
    assert found.unscored == ["001/other.jsonl"]
    comparable = [score for one in found.scores for score in one]
    assert comparing.missing_scores(comparable)[2:4] == [
        "KV compression, matched, seed 3: 0.1 – 0.4, 0.6 – 0.9",
        "KV compression, matched, seed 4: 0.1 – 0.8",
    ]
    assert "local attention, matched, seed 3: 0.1 – 0.4, 0.6 – 0.9" in comparing.missing_scores(comparable)
    text = "\n".join(writing.build(found).lines)
    assert "### Missing continuations\n\n- full attention, matched, seed 3: 0" in text
    assert "## Continuations that are not scored yet\n\n- 001/other.jsonl" in text
    assert "### Claim 2\n\nNo continuations were scored." in text_of(tmp_path / "none", results())


@pytest.mark.parametrize(
    "name", ["documents_sha256", "bertscore_model", "bertscore_layer", "fluency_model", "convention"]
)
def test_scores_of_other_documents_or_scorers_are_not_compared(tmp_path, name):
    write(tmp_path, scores("kv_compression", better=0.05), scores("local_attention", **{name: None}))
    found = collecting.collect(tmp_path).scores
    assert [len(comparable) for comparable in found] == [1, 1]
    assert not any(comparing.judge_claim_2(comparable, "matched") for comparable in found)


def test_scores_know_the_run_beside_them(tmp_path):
    write(tmp_path, results(sink_tokens=4, seed=3))
    (tmp_path / "000" / "scores.json").write_text(json.dumps(scores("kv_compression")))
    (tmp_path / "000" / "scores_window.json").write_text(json.dumps(scores("local_attention")))
    (tmp_path / "000" / "window.about.json").write_text(json.dumps({"top_p": 0.5}))
    by_method = {score.method: score for one in collecting.collect(tmp_path).scores for score in one}
    assert (by_method["kv_compression"].variant, by_method["kv_compression"].seed) == ("sinks 4", 3)
    assert by_method["local_attention"].variant == "trained as KV compression"
    assert len(collecting.collect(tmp_path).scores) == 2  # they were not generated alike


def test_scores_tell_what_was_generated_otherwise_than_it_was_trained(tmp_path):
    write(tmp_path, results(recent_tokens=15))
    run = tmp_path / "000"
    for name, ratio, told in (("a", 0.5, 15), ("b", 0.5, 7), ("c", 0.9, 15)):
        (run / f"scores_{name}.json").write_text(json.dumps(scores("kv_compression", ratio)))
        about = {"top_p": 0.9, "recent_tokens": told}
        (run / f"{name}.about.json").write_text(json.dumps(about))
    found = {score.path[-6]: score.variant for score in collecting.collect(tmp_path).scores[0]}
    assert found == {"a": "window 15", "b": "window 15, window 7 generating", "c": "window 15, trained at 0.5"}


def test_methods_without_sentinels_compare_with_kv_compression_that_folds_what_it_generates_and_that_does_not(tmp_path):
    for number, (method, better, folds) in enumerate(
        (("kv_compression", 0.2, False), ("kv_compression", 0.1, True), ("local_attention", 0, False))
    ):
        write(tmp_path / str(number), scores(method, better=better))
        about = {"top_p": 0.9, "compress_generated": folds}
        (tmp_path / str(number) / "000" / "generation.about.json").write_text(json.dumps(about))
    found = collecting.collect(tmp_path)
    assert [[score.method for score in some] for some in found.scores] == [["kv_compression", "local_attention"]] * 2
    gains = [comparing.judge_claim_2(some, "matched")[0]["difference"] for some in found.scores]
    assert gains == pytest.approx([0.2, 0.1], abs=0.02)
    assert "3 scored files" in found.summary()
    text = "\n".join(writing.build(found).lines)
    assert text.index("kept whole what it generated") < text.index("--compress_generated")


def test_published_figures():
    assert published.perplexities("paper", "local_attention")[0.9] == 22.9
    assert published.perplexities("repro", "kv_compression")[0.1] == 11.55
    assert published.above_full("repro", "scattered_attention")[0.5] == pytest.approx(35.11 / 10.33)
    assert published.perplexities("paper", "sink_attention") == {}
    for source in published.SOURCES:
        assert all(
            set(published.perplexities(source, method)) == {0.0, *collecting.GRID} for method in published.METHODS
        )


def run_script(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "report.py"), *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )


def test_the_script_writes_everything_and_the_same_again(tmp_path):
    runs = grid(seeds=(0, 1), protocols=("paper", "matched")) + [results(recent_tokens=12), scores("kv_compression")]
    folder = write(tmp_path / "in", *runs, scores("local_attention"), scores("local_attention", 0.9))
    done = run_script(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"93 runs in 1 group of equal settings, 3 scored files, 0 duplicate, 0 unreadable: {folder}/report.md\n"
    )
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    pictures = sorted(folder.glob("*.png"))
    assert [path.name for path in pictures] == [
        *(f"report_1_{name}.png" for name in ("kept_keys", "measured", "nominal", "shape")),
        "report_scores_1.png",
    ]
    for path in pictures:
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", head[16:])
        assert 900 <= width <= 1500
        assert 500 <= height <= 1200
        assert f"({path.name})" in text
        assert path.with_suffix(".svg").read_text().startswith("<?xml")
    with open(folder / "report_runs.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 93
    assert text.index("## Verdicts") > text.index("### Missing runs")
    assert "- none" in text

    def made(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.iterdir() if path.is_file() and path.name != ownership.LIST)
        return {path.name: path.read_bytes() for path in files}

    writing.write(collecting.collect(folder), tmp_path / "out")
    assert made(tmp_path / "out") == made(folder)


def test_a_results_file_stands_for_its_folder_and_others_for_none(tmp_path):
    folder = write(tmp_path / "in", results()) / "000"
    done = run_script(folder / "results.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f": {folder}/report.md\n")
    done = run_script(folder / "report.md")
    assert done.returncode == 2
    assert done.stderr == f"error: {folder}/report.md is a file: name the folder where results lie, at any depth\n"


@pytest.mark.parametrize("name", ["report.md", "report_runs.csv", "report_1_measured.png"])
def test_a_file_of_somebody_else_is_not_reported_over(tmp_path, name):
    folder = write(tmp_path / "in", *grid())
    (folder / name).write_text("years of work")
    before = sorted(path.name for path in folder.iterdir())
    done = run_script(folder)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"{name} is not what these scripts have written there" in done.stderr
    assert "--output_dir" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == before
    (folder / name).unlink()
    assert [run_script(folder).returncode for _ in range(2)] == [0, 0]
    (folder / name).write_text("edited")
    assert run_script(folder).returncode == 2
    assert (folder / name).read_text() == "edited"


@pytest.mark.parametrize("content", [None, b"{"])
def test_nothing_to_report_is_one_line_and_exit_status_2(tmp_path, content):
    if content:
        (tmp_path / "results.json").write_bytes(content)
    done = run_script(tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "no results" in done.stderr
    assert not (tmp_path / "report.md").exists()
    with pytest.raises(UsageError, match="no such folder"):
        collecting.collect(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_written_to_is_one_line_and_exit_status_1(tmp_path):
    write(tmp_path, results())
    (tmp_path / "file").write_text("")
    done = run_script(tmp_path, "--output_dir", tmp_path / "file" / "out")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def trained(run: dict, steps: int, targets: int) -> dict:
    """The run with what it was trained on and scored on."""
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "block_size": 256}
    return run | {"training": {"steps": steps}, "num_targets": targets, "settings": run["settings"] | sizes}


@pytest.mark.parametrize(
    ("steps", "targets", "words"),
    [
        (50, 30_000, None),
        (2, 30_000, "trained on 24 blocks of 256 tokens (the paper's recipe: 28,000)."),
        (24, 30_000, None),
        (23, 30_000, "trained on 276 blocks"),
        (50, 510, "A demonstration, not a measurement: scored on 510 tokens (the paper: 280,000)."),
    ],
)
def test_verdicts_of_little_training_say_so(tmp_path, steps, targets, words):
    runs = [trained(run, steps, targets) for run in (*grid(ratios=(0.5,)), results(recent_tokens=9, kept=60))]
    text = text_of(tmp_path, *runs)
    lines = text[text.index("## Verdicts") :].splitlines()
    verdicts_on_kv = [line for line in lines if "1 of 9 ratios" in line and "times the baseline's" in line]
    assert len(verdicts_on_kv) >= 3
    beyond = text[text.index("## Beyond the paper") :]
    for line in (*verdicts_on_kv, beyond):
        assert ("A demonstration, not a measurement: " in line) == (words is not None)
        assert (words or "") in line


def test_verdicts_on_few_documents_are_none(tmp_path):
    for count, words in ((4, "too few documents at 0.5; 1 of 9 ratios measured"), (20, "holds at 0.5")):
        pair = scores("kv_compression", better=0.1, count=count), scores("local_attention", count=count)
        text = text_of(tmp_path / str(count), *pair)
        assert f"- ROUGE-L: {words}" in text
        assert f"- perplexity: {words}" in text
