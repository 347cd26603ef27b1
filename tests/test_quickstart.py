"""How the quick start ends: every word of it computed from what the runs have left."""

import json
import math
from pathlib import Path

import pytest

from kv_compression.reporting import drawing, plotting, quickstart
from tests.made_results import results
from tests.runs import call_script

PERPLEXITIES = {
    ("full_attention", "paper"): 13.92,
    ("kv_compression", "paper"): 29.03,
    ("kv_compression", "best"): 14.31,
    ("local_attention", "paper"): 37.79,
    ("sink_attention", "paper"): 18.40,
    ("scattered_attention", "paper"): 75.03,
}


def runs_of(perplexities: dict) -> dict:
    return {
        (method, recipe): results(
            method, 0.0 if method == "full_attention" else 0.5, kept=98.4 if recipe == "best" else None, recipe=recipe
        )
        | {"perplexity": value}
        for (method, recipe), value in perplexities.items()
    }


def test_the_finding_is_two_sentences_from_the_numbers():
    assert quickstart.finding(runs_of(PERPLEXITIES)) == (
        "With 50% of the cache removed, plain KV compression has a test perplexity of 29.0, lower than local "
        "attention's 37.8 and scattered attention's 75.0, higher than sink attention's 18.4. With --recipe best it "
        "has 14.3, lower than sink attention's 18.4, local attention's 37.8 and scattered attention's 75.0; while "
        "it reads it holds 98 keys on average, sink attention 64; full attention, which keeps the whole cache, has "
        "13.9."
    )
    other = PERPLEXITIES | {("kv_compression", "best"): 40.0, ("kv_compression", "paper"): 18.40}
    text = quickstart.finding(runs_of(other))
    assert "lower than local attention's 37.8 and scattered attention's 75.0, as high as sink attention's 18.4." in text
    assert "40.0, lower than scattered attention's 75.0, higher than sink attention's 18.4 and local" in text


def test_a_run_without_a_perplexity_is_higher_than_all():
    text = quickstart.finding(runs_of(PERPLEXITIES | {("kv_compression", "paper"): None}))
    assert "perplexity of -, higher than sink attention's 18.4, local attention's 37.8 and scattered" in text


@pytest.fixture
def folders(tmp_path, monkeypatch) -> list[str]:
    """The folders of six runs, each with a generation file, below the current one."""
    monkeypatch.chdir(tmp_path)
    names = []
    for (method, recipe), run in runs_of(PERPLEXITIES).items():
        folder = Path(f"output/{method}_{run['bound_ratio']}" + "_best" * (recipe == "best"))
        folder.mkdir(parents=True)
        sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "block_size": 256}
        run |= {"training": {"steps": 16}, "num_targets": 6120, "settings": run["settings"] | sizes}
        (folder / "results.json").write_text(json.dumps(run))
        record = {"index": 0, "prefix": "a b\x1b " * 40, "reference": "so it goes", "cache_length": 64}
        record |= {"prefix_tokens": 128, "continuations": [f"as {method} says", "and again"]}
        (folder / "generation.jsonl").write_text(json.dumps(record) + "\n")
        names.append(str(folder))
    return names


def test_the_end_shows_plot_continuation_finding_and_next_step(folders, monkeypatch, capsys):
    status, out, errors = call_script(quickstart.main, ["quickstart", *folders], monkeypatch, capsys)
    assert (status, errors) == (0, [])
    assert out[0] == "Plot: output/perplexity_0.5.png"
    assert Path("output/perplexity_0.5.png").read_bytes().startswith(b"\x89PNG")
    assert "lower than" not in Path("output/perplexity_0.5.svg").read_text()
    text = "\n".join(out)
    assert "whose cache holds 50% of the prefix's keys" in text
    assert "sampled   as kv_compression says" in text
    assert "and again" not in text
    assert all(line.isprintable() and len(line) <= 100 for line in out)
    flat = " ".join(text.split())
    assert (
        f"Finding: {quickstart.finding(runs_of(PERPLEXITIES))} A demonstration, not a measurement: trained on 64"
        in flat
    )
    assert out[-1] == "Next: sh quickstart.sh 0.9"


def test_what_is_not_there_is_named(folders, monkeypatch, capsys):
    Path(folders[2], "generation.jsonl").write_text("")
    status, _, errors = call_script(quickstart.main, ["quickstart", *folders], monkeypatch, capsys)
    assert status == 1
    assert "kv_compression_0.5_best/generation.jsonl holds no continuation" in errors[0]
    Path(folders[1], "results.json").unlink()
    status, _, errors = call_script(quickstart.main, ["quickstart", *folders], monkeypatch, capsys)
    assert (status, errors) == (1, ["error: no results in output/kv_compression_0.5"])


def test_perplexities_that_no_plot_can_show(tmp_path):
    picture = plotting.one_ratio([("full_attention", "full", math.inf), ("local_attention", "local", 3.0)])
    drawing.draw(tmp_path / "a.png", picture)
    drawing.draw(tmp_path / "b.png", plotting.one_ratio([("local_attention", "local", math.inf)]))
