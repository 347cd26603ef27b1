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

from kv_compression import measured, published, report, verdicts
from kv_compression.errors import UsageError

ROOT = Path(__file__).parent.parent
BASELINES = ("local_attention", "scattered_attention", "sink_attention")
# Nats above full attention, at a ratio: so that every method has a shape of its own.
SLOPES = {"full_attention": 0, "kv_compression": 1, "local_attention": 1.5, "scattered_attention": 2.5}


def results(method="kv_compression", ratio=0.5, protocol="matched", seed=0, nll=None, kept=None, **settings) -> dict:
    """What a results.json holds; `settings` beyond those of every run here make variants or groups."""
    nll = 3 + SLOPES.get(method, 1.2) * ratio + 0.01 * seed if nll is None else nll
    return {
        "method": method,
        "bound_ratio": ratio,
        "protocol": protocol,
        "preset": "embedded",
        "seed": seed,
        "eval_only": settings.get("eval_only", False),
        "perplexity": math.exp(nll),
        "nll": nll,
        "nll_per_token": nll,
        "nll_per_batch": nll + 0.001,
        "removed_fraction": ratio,
        "attended_fraction": 1 - ratio,
        "kept_keys_mean": 128 * (1 - ratio) if kept is None else kept,
        "kept_keys_max": 256,
        "untrained": {"nll_per_token": nll + 1, "nll_per_batch": nll + 1},
        "settings": {
            "model_name_or_path": "a/tiny",
            "test_file": "test.txt sha256:0",
            "learning_rate": 1e-3,
            **settings,
        },
    }


def scores(method, ratio=0.5, better=0.0, count=20, **changes) -> dict:
    """What a scores.json holds: documents whose scores are all `better` than another file's, but for noise."""
    noise = np.random.default_rng(len(method)).normal(0, 0.01, count)
    documents = {
        str(index): {"rouge_l": 0.2 + better + e, "bertscore": 0.5 + better + e, "perplexity": 50 - 100 * better + e}
        for index, e in enumerate(noise)
    }
    means = {name: float(np.mean([found[name] for found in documents.values()])) for name in documents["0"]}
    return {
        "method": method,
        "bound_ratio": ratio,
        "protocol": "matched",
        "preset": "embedded",
        "documents_sha256": "d0c5",
        "bertscore_model": "encoder",
        "fluency_model": "model",
        "cache_fraction": 1 - ratio,
        **{name: {"mean": value, "low": value - 0.01, "high": value + 0.01} for name, value in means.items()},
        "documents": documents,
        **changes,
    }


def write(folder: Path, *contents: dict) -> Path:
    """A folder for each of the contents, named so that they sort as given."""
    for number, content in enumerate(contents):
        name = "results.json" if "settings" in content else "scores.json"
        path = folder / f"{number:03}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def group_of(folder: Path, *contents: dict) -> measured.Group:
    (group,) = measured.collect(write(folder, *contents)).groups
    return group


def text_of(folder: Path, *contents: dict) -> str:
    return "\n".join(report.build(measured.collect(write(folder, *contents))).lines)


def grid(
    methods=("kv_compression", *BASELINES), ratios=measured.GRID, seeds=(0,), protocols=("matched",)
) -> list[dict]:
    """A sweep; methods without sentinels run once, under the last protocol."""
    runs = [results("full_attention", 0.0, protocols[-1], seed) for seed in seeds]
    for method in methods:
        for protocol in protocols if method == "kv_compression" else protocols[-1:]:
            runs += [results(method, ratio, protocol, seed) for ratio in ratios for seed in seeds]
    return runs


def test_runs_are_grouped_by_what_must_be_equal(tmp_path):
    same = [results(), results("local_attention"), results(seed=1), results(protocol="paper"), results(sink_tokens=4)]
    same += [results(ratio=0.1, attn_implementation="eager", fixed_spans=False, recipe="best")]
    other = [results(learning_rate=1.0), results("full_attention", 0.0, learning_rate=1.0)]
    groups = measured.collect(write(tmp_path, *same, *other)).groups
    assert [len(group.runs) for group in groups] == [6, 2]
    assert groups[1].settings["learning_rate"] == 1.0
    text = text_of(tmp_path)
    assert "Claim 1, group 2: tiny on test.txt" in text
    assert "report_2_measured.png" in text


def test_old_files_lack_what_was_not_recorded_yet(tmp_path):
    old = results("local_attention")
    for name in ("kept_keys_mean", "kept_keys_max", "nll_per_batch", "nll_per_token", "attended_fraction", "untrained"):
        del old[name]
    new = results(sink_tokens=0, cr_tokens=1, cr_visibility="span", distill_weight=0.0, max_eval_blocks=None)
    group = group_of(tmp_path, old, new)
    assert [run.variant for run in group.runs] == ["", ""]
    row = next(row for row in verdicts.describe(group, "matched") if row["method"] == "local_attention")
    assert row["perplexity"] == pytest.approx(old["perplexity"])
    assert row["kept_keys_mean"] is None
    assert "| local attention | 0.5 | 1 | 0.500 | - | - | - |" in text_of(tmp_path)


def test_methods_without_sentinels_serve_both_protocols(tmp_path):
    group = group_of(tmp_path, results(protocol="paper"), results("local_attention"), results("full_attention", 0.0))
    found = {point.method: point for point in measured.points(group, "paper")}
    assert found.keys() == {"kv_compression", "local_attention", "full_attention"}
    assert found["local_attention"].nlls[0] == group.runs[1].content["nll_per_batch"]
    assert not measured.select(measured.points(group, "matched"), "kv_compression")
    own = results("local_attention", protocol="paper", nll=1.0)
    group = group_of(tmp_path, results(protocol="paper"), results("local_attention"), own)
    assert measured.select(measured.points(group, "paper"), "local_attention")[0.5].nlls[0] == pytest.approx(1.001)


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
    assert measured.variant_of(results(**settings))[0] == variant


def test_settings_of_spans_make_no_variant_of_a_method_without_them():
    assert measured.variant_of(results("local_attention", max_span_length=8, fixed_spans=True)) == ("", "")
    assert measured.variant_of(results("sink_attention", sink_tokens=4)) == ("", "")
    assert measured.variant_of(results("sink_attention", sink_tokens=1)) == ("sinks 1", "")
    assert measured.variant_of(results(protocol="paper", fixed_spans=True)) == ("", "")
    apart = results("full_attention", 0.0, isolate_documents=True)
    assert measured.variant_of(apart) == ("documents apart", "documents apart")


def test_variants_stay_off_the_plain_curve_and_have_their_own_table(tmp_path):
    runs = [results(nll=3.5), results(nll=1.0, sink_tokens=4), results("full_attention", 0.0, nll=3.0)]
    runs += [results("full_attention", 0.0, nll=0.5, isolate_documents=True), results(nll=2.0, isolate_documents=True)]
    group = group_of(tmp_path, *runs)
    assert measured.select(measured.points(group, "matched"), "kv_compression")[0.5].nlls == {0: 3.5}
    rows = {row["variant"]: row for row in verdicts.describe(group, "matched") if row["method"] == "kv_compression"}
    assert rows["sinks 4"]["nats_above_full"] == -2.0
    assert rows["documents apart"]["nats_above_full"] == 1.5  # not of the runs that see other documents
    assert "| KV compression | sinks 4 | 0.5 |" in text_of(tmp_path).split("### Variants")[1]


def test_a_run_without_fine_tuning_is_the_untrained_column_not_a_curve(tmp_path):
    tuned = results("local_attention", nll=3.0) | {"untrained": None}
    group = group_of(tmp_path, tuned, results("local_attention", nll=6.0, eval_only=True), results())
    plain, untrained = (row for row in verdicts.describe(group, "matched") if row["method"] == "local_attention")
    assert (plain["perplexity"], plain["untrained_perplexity"]) == pytest.approx((math.exp(3), math.exp(6)))
    assert (untrained["variant"], untrained["fine_tuned"]) == ("not fine-tuned", False)


def test_mean_and_spread_over_seeds(tmp_path):
    nlls = np.array([3.0, 3.3, 3.1])
    runs = [results(seed=seed, nll=nll) for seed, nll in enumerate(nlls)]
    runs += [
        results("local_attention", seed=seed, nll=nll + gap) for seed, (nll, gap) in enumerate(zip(nlls, (1, 2, 4)))
    ]
    group = group_of(tmp_path, *runs)
    row = verdicts.describe(group, "matched")[0]
    assert row["perplexity"] == pytest.approx(np.exp(nlls).mean())
    assert row["perplexity_spread"] == pytest.approx(np.exp(nlls).std(ddof=1))
    (judged,) = verdicts.judge_claim_1(group, "matched")
    gaps = np.array([-1, -2, -4])
    half = 4.303 * gaps.std(ddof=1) / math.sqrt(3)  # Student's t, two degrees of freedom
    assert (judged["difference"], judged["spread"]) == pytest.approx((gaps.mean(), gaps.std(ddof=1)))
    assert (judged["low"], judged["high"]) == pytest.approx((gaps.mean() - half, gaps.mean() + half))


def test_differences_are_of_equal_seeds():
    assert verdicts.difference({0: 1.0, 1: 2.0}, {1: 5.0, 2: 9.0}).values == (-3.0,)
    assert verdicts.difference({0: 1.0}, {1: 5.0}) is None


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
    assert verdicts.Difference(values).verdict == verdict


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
    rows = verdicts.judge_kept_keys(group, "matched")
    assert [(row["ratio"], row["seeds"]) for row in rows] == [(0.5, 1), (0.7, 1)]
    assert rows[0]["baseline_perplexity"] == pytest.approx(math.exp(3.25))
    assert (rows[0]["baseline_kept_below"], rows[0]["baseline_kept_above"]) == (20, 60)
    assert rows[1]["baseline_perplexity"] == pytest.approx(math.exp(4))
    assert report.interpolated(rows[0], "baseline") == f"≈ {math.exp(3.25):.2f} (20.0 – 60.0)"
    assert report.interpolated(rows[1], "baseline") == f"{math.exp(4):.2f}"  # measured just there
    described = {row["ratio"]: row for row in verdicts.describe(group, "matched") if row["method"] == "kv_compression"}
    assert described[0.5]["sink_perplexity"] == pytest.approx(math.exp(3.25))
    assert described[0.9]["sink_perplexity"] is described[0.1]["sink_perplexity"] is None


def test_missing_runs_are_listed(tmp_path):
    runs = [run for run in grid(seeds=(0, 1), protocols=("paper", "matched"))]
    assert verdicts.missing(group_of(tmp_path / "full", *runs)) == []
    gone = {
        ("kv_compression", "paper", 0.5, 1),
        ("local_attention", "matched", 0.1, 0),
        ("full_attention", "matched", 0.0, 1),
    }
    gone |= {("kv_compression", "paper", ratio, 0) for ratio in (0.2, 0.3, 0.4, 0.9)}
    left = [run for run in runs if tuple(run[k] for k in ("method", "protocol", "bound_ratio", "seed")) not in gone]
    assert verdicts.missing(group_of(tmp_path / "part", *left)) == [
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
    found = measured.collect(tmp_path)
    assert [path for path, _ in found.unreadable] == ["x|y.json"]
    (line,) = [line for line in report.build(found).lines if line.startswith("- x\\|y.json")]
    assert "\n" not in line
    assert str(tmp_path) not in line


def test_files_of_other_programs_are_passed_over(tmp_path):
    write(tmp_path, results())
    for name in ("adapter_config.json", "tokenizer_config.json", "special_tokens_map.json", "generation.about.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "some.json").write_text("{")
    (tmp_path / "kv_0.1.json").write_text(json.dumps(results(ratio=0.1)))  # results by another name
    found = measured.collect(tmp_path)
    assert found.unreadable == []
    assert [run.path for run in found.groups[0].runs] == ["000/results.json", "kv_0.1.json"]


def test_text_of_files_stays_in_its_place(tmp_path):
    names = {"model_name_or_path": "a|b\n# c `d` <e> ](f)\\", "cr_visibility": "x|y\r\nz"}
    write(tmp_path, results() | {"device": "gpu\n1,2"}, results(**names), results("local_attention", **names))
    (tmp_path / os.fsdecode(b"\xff|\n")).mkdir()
    shutil.copy(tmp_path / "000" / "results.json", tmp_path / os.fsdecode(b"\xff|\n") / "results.json")
    text = report.write(measured.collect(tmp_path), tmp_path / "out").read_text(encoding="utf-8")
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
        for row in verdicts.judge_claim_2(measured.collect(write(tmp_path, *runs)).scores[0], "matched")
    }
    assert {metric: row["verdict"] for metric, row in rows.items()} == dict.fromkeys(measured.METRICS, "holds")
    ours, theirs = (np.array([d["rouge_l"] for d in one["documents"].values()]) for one in runs)
    assert rows["rouge_l"]["difference"] == pytest.approx((ours - theirs).mean())
    assert rows["rouge_l"]["low"] < rows["rouge_l"]["difference"] < rows["rouge_l"]["high"]
    assert "- ROUGE-L: holds at 0.5; 1 of 9 ratios measured" in text_of(tmp_path)
    worse = text_of(tmp_path, scores("kv_compression", better=-0.05), scores("local_attention"))
    assert "- ROUGE-L: reversed at 0.5" in worse
    assert "- perplexity: reversed at 0.5" in worse
    same = text_of(tmp_path, scores("kv_compression"), scores("local_attention"))
    assert "- BERTScore: no difference shown at 0.5" in same


@pytest.mark.parametrize("name", ["documents_sha256", "bertscore_model", "fluency_model"])
def test_scores_of_other_documents_or_scorers_are_not_compared(tmp_path, name):
    write(tmp_path, scores("kv_compression", better=0.05), scores("local_attention", **{name: None}))
    found = measured.collect(tmp_path).scores
    assert [len(comparable) for comparable in found] == [1, 1]
    assert not any(verdicts.judge_claim_2(comparable, "matched") for comparable in found)


def test_scores_know_the_run_beside_them(tmp_path):
    write(tmp_path, results(sink_tokens=4, seed=3))
    (tmp_path / "000" / "scores.json").write_text(json.dumps(scores("kv_compression")))
    (tmp_path / "000" / "scores_window.json").write_text(json.dumps(scores("local_attention")))
    (tmp_path / "000" / "window.about.json").write_text(json.dumps({"top_p": 0.5}))
    by_method = {score.method: score for one in measured.collect(tmp_path).scores for score in one}
    assert (by_method["kv_compression"].variant, by_method["kv_compression"].seed) == ("sinks 4", 3)
    assert by_method["local_attention"].variant == "trained as KV compression"
    assert len(measured.collect(tmp_path).scores) == 2  # they were not generated alike


def test_published_figures():
    assert published.perplexities("paper", "local_attention")[0.9] == 22.9
    assert published.perplexities("repro", "kv_compression")[0.1] == 11.55
    assert published.above_full("repro", "scattered_attention")[0.5] == pytest.approx(35.11 / 10.33)
    assert published.perplexities("paper", "sink_attention") == {}
    for source in published.SOURCES:
        assert all(set(published.perplexities(source, method)) == {0.0, *measured.GRID} for method in published.METHODS)


def run_script(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "report.py"), *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )


def test_the_script_writes_everything_and_the_same_again(tmp_path):
    runs = grid(seeds=(0, 1), protocols=("paper", "matched")) + [results(recent_tokens=12), scores("kv_compression")]
    folder = write(tmp_path / "in", *runs, scores("local_attention"))
    done = run_script(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"93 runs in 1 group of equal settings, 2 scored files, 0 duplicate, 0 unreadable: {folder}/report.md\n"
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
    with open(folder / "report_runs.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 93
    assert text.index("## Verdicts") > text.index("### Missing runs")
    assert "- none" in text

    made = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    report.write(measured.collect(folder), tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == made


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
        measured.collect(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_written_to_is_one_line_and_exit_status_1(tmp_path):
    write(tmp_path, results())
    (tmp_path / "file").write_text("")
    done = run_script(tmp_path, "--output_dir", tmp_path / "file" / "out")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
