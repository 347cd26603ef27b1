"""A sweep: its runs and their order, processes that stub runs, a stand-in for slurm, and a real sweep in small."""

import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eval_generation
import generate_c4
import run_clm
import sweep as script
from kv_compression import settings as run_settings
from kv_compression.io.errors import RunError
from kv_compression.io.results import read_results, write_json
from kv_compression.methods import METHODS
from kv_compression.sweep import jobs as sweep_jobs
from kv_compression.sweep import slurm, workers
from kv_compression.sweep.plan import PlannedRun, plan, spread
from kv_compression.sweep.workers import Workers
from tests.conftest import sentences
from tests.runs import run_script as run
from tests.stand_in_slurm import FULL, StandInSlurm

ROOT = Path(__file__).parent.parent
RATIOS = [number / 10 for number in range(1, 10)]
# Not imported: that configures logging.
needs_submitit = pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed")
BOTH = ["kv_compression", "local_attention"]


def write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def tiny(tiny_model, tmp_path_factory) -> list[str]:
    """Flags of run_clm.py for a run that takes no time, and a folder with its files."""
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder / "train.jsonl", sentences(24, 0))
    write_texts(folder / "test.jsonl", sentences(24, 1))
    write_texts(folder / "docs.jsonl", [" ".join(sentences(6, seed)) for seed in range(2, 5)])
    flags = ["--preset", "embedded", "--model_name_or_path", tiny_model, "--train_file", f"{folder}/train.jsonl"]
    flags += ["--test_file", f"{folder}/test.jsonl", "--block_size", "32", "--max_span_length", "8"]
    return [*flags, "--max_train_steps", "2", "--max_eval_blocks", "2"]


def settings_of(flags) -> run_settings.Settings:
    return run_settings.resolve(run_settings.parse(flags)[0])


@given(st.lists(st.floats(0, 0.99), min_size=1, max_size=40))
def test_the_first_ratios_cover_their_range(values):
    order = spread(values)
    assert sorted(order) == sorted(set(values))
    ranks = {value: rank for rank, value in enumerate(sorted(order))}
    for count in range(3, len(order) + 1):
        seen = sorted(ranks[value] for value in order[:count])
        gaps = [high - low for low, high in zip(seen, seen[1:])]
        assert max(gaps) <= 4 * min(gaps)


def test_the_order_of_runs():
    assert spread(RATIOS) == [0.5, 0.9, 0.1, 0.7, 0.3, 0.8, 0.6, 0.4, 0.2]
    runs = plan(BOTH, [0.1, 0.5, 0.9], [0, 3], ["matched", "paper"])
    first = ["full_attention_0.0", "full_attention_0.0_untrained", "kv_compression_0.5", "kv_compression_0.5_paper"]
    assert [run.name for run in runs[:5]] == [*first, "local_attention_0.5"]
    assert [run.ratio for run in runs if run.method == "local_attention"] == [0.5, 0.9, 0.1] * 2
    assert [run.seed for run in runs] == [0] * 11 + [3] * 10
    assert (runs[11].name, runs[-2].name) == ("full_attention_0.0_seed3", "kv_compression_0.1_paper_seed3")


def test_with_accumulation_every_protocol_has_its_own_baselines():
    """The protocols then train with other learning rates."""
    runs = plan(BOTH, [0.5], [0], ["matched", "paper"], accumulation=3)
    each = ["full_attention_0.0{}", "full_attention_0.0{}_untrained", "kv_compression_0.5{}", "local_attention_0.5{}"]
    assert [run.name for run in runs] == [name.format(end) for name in each for end in ("", "_paper")]
    assert [run.protocol for run in runs] == ["matched", "paper"] * 4


@given(
    st.lists(st.sampled_from(list(METHODS)), min_size=1, unique=True),
    st.lists(st.sampled_from(RATIOS), min_size=1, unique=True),
    st.lists(st.integers(0, 9), min_size=1, unique=True),
    st.sampled_from([["paper"], ["matched"], ["paper", "matched"]]),
)
def test_what_does_not_depend_on_a_choice_runs_once(methods, ratios, seeds, protocols):
    runs = plan(methods, ratios, seeds, protocols)
    assert len({run.name for run in runs}) == len(runs)
    assert sum(run.eval_only for run in runs) == 1
    sentinels = sum(METHODS[method].uses_sentinels for method in methods)
    others = len(set(methods) - {"full_attention"}) - sentinels
    assert len(runs) == 1 + len(seeds) * (1 + len(ratios) * (sentinels * len(protocols) + others))
    for one in runs:
        assert one.protocol == ("matched" if "matched" in protocols else "paper") or METHODS[one.method].uses_sentinels


def test_options_of_kv_compression_are_for_kv_compression():
    asked = {"cr_tokens": 2, "sink_tokens": 4, "r": 8, "lora_target_modules": ("a", "b"), "fixed_spans": True}
    flags = {method: PlannedRun(method, 0.5, "matched").flags(asked) for method in METHODS}
    assert flags["kv_compression"][10:14] == ["--cr_tokens", "2", "--sink_tokens", "4"]
    assert flags["local_attention"][10:] == ["--r", "8", "--lora_target_modules", "a", "b", "--fixed_spans"]
    assert flags["sink_attention"][10:13] == ["--sink_tokens", "4", "--r"]


@pytest.fixture
def jobs(tiny, tmp_path):
    """Makes the jobs of a sweep in `tmp_path`; `others` are more flags for its runs."""

    def jobs(protocols=("matched",), **others):
        given = {name: value for name, value in run_settings.parse(tiny)[0].items() if value is not None}
        return sweep_jobs.make_jobs(plan(BOTH, [0.5], [0], protocols), tmp_path, given | others)

    return jobs


def pretend(job, **others) -> Path:
    """Leave results where a job's run would, of its settings except for `others`."""
    chosen = settings_of(job.steps[0].command[2:])
    content = dict.fromkeys(("perplexity", "removed_fraction"), 1.0) | vars(chosen)
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder / "results.json"
    path.write_text(json.dumps(content | {"settings": chosen.identity() | others}))
    return path


def missing(jobs) -> list[str]:
    return [job.name for job in jobs if job.missing()]


def test_finished_runs_are_not_missing_whatever_machine_made_them(jobs):
    names = ["full_attention_0.0", "full_attention_0.0_untrained", "kv_compression_0.5", "local_attention_0.5"]
    assert missing(jobs()) == names
    for job in jobs()[::3]:
        pretend(job)
    assert missing(jobs()) == names[1:3]
    for job in jobs():
        pretend(job, attn_implementation="flex_attention", mixed_precision="bf16")
    assert missing(jobs()) == []
    assert missing(jobs(("paper", "matched"))) == missing(jobs(("paper",))) == ["kv_compression_0.5_paper"]
    assert list(sweep_jobs.print_commands(jobs(mixed_precision="no"))) == names  # bf16 is there


def test_another_experiment_in_the_folder_is_reported_and_left_alone(jobs, tmp_path):
    paths = [pretend(job) for job in jobs()]
    failed = sweep_jobs.run_missing(jobs(learning_rate=0.5), Workers())
    assert len(failed) == 4
    assert all("learning_rate 0.001 there, 0.5 here" in reason for reason in failed.values())
    assert all(path.exists() for path in paths)
    assert not (tmp_path / "logs").exists()


STUB = """
import os, signal, sys, time
folder, name, seconds, status = sys.argv[1:]
heard = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: heard.append(signal.Signals(number).name))
with open(f"{folder}/started", "a") as file:
    file.write(f"{name} {os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\\n")
end = time.monotonic() + float(seconds)
while time.monotonic() < end and not heard:
    time.sleep(0.02)
if heard:
    time.sleep(0.5)  # for more signals
    open(f"{folder}/{name}.heard", "w").write(" ".join(heard))
    time.sleep(600 if status == "stubborn" else 0)
    sys.exit(130)
print("output of", name, flush=True)
if status != "0":
    print("error: an old one\\nerror: no luck", file=sys.stderr)
    sys.exit(int(status))
open(f"{folder}/{name}.done", "w").close()
"""


def stub(folder, name, seconds=0.0, status=0, steps=1, script="stub.py") -> sweep_jobs.Job:
    """A job whose steps note their process, take a while, and note the signals that end them."""
    folder.mkdir(exist_ok=True)
    (folder / script).write_text(STUB)
    found = []
    for number in range(steps):
        own = f"{name}{number or ''}"
        command = [sys.executable, str(folder / script), str(folder), own, str(seconds), str(status)]
        found.append(sweep_jobs.Step(command, (folder / f"{own}.done").exists))
    (folder / name).mkdir(exist_ok=True)
    return sweep_jobs.Job(folder / name, found)


def started(folder, column=0) -> list[str]:
    path = folder / "started"
    return [line.split()[column] for line in path.read_text().splitlines()] if path.exists() else []


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def in_another_process(work, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def test_a_failing_job_is_listed_and_the_others_are_done(tmp_path, capfd):
    found = [stub(tmp_path, "a", steps=2), stub(tmp_path, "b", status=3, steps=2), stub(tmp_path, "c")]
    reason = f"stub.py ended with exit status 3: no luck ({tmp_path}/logs/b.log)"
    assert sweep_jobs.run_missing(found, Workers()) == {"b": reason}
    assert started(tmp_path) == ["a", "a1", "b", "c"]
    out, err = capfd.readouterr()
    assert out.splitlines() == ["a (1 of 3)", "b (2 of 3)", "c (3 of 3)"]
    assert err.splitlines()[:2] == ["output of a", "output of a1"]
    assert (tmp_path / "logs" / "c.log").read_text() == "output of c\n"
    (tmp_path / "a1.done").unlink()
    assert sweep_jobs.run_missing(found[:1], Workers()) == {}
    assert started(tmp_path)[4:] == ["a1"]


def test_a_job_fails_by_what_it_leaves(tmp_path):
    """What failed here and another process has done has not failed, what leaves no results has, and runs once."""

    def job(name, status, done):
        job = stub(tmp_path, name, status=status)
        return job._replace(steps=[job.steps[0]._replace(done=done)])

    found = [job("a", 3, lambda: "b" in started(tmp_path)), job("b", 0, lambda: False)]
    assert sweep_jobs.run_missing(found, Workers()) == {"b": "all commands succeeded, but their results are missing"}
    assert started(tmp_path) == ["a", "b"]


def test_several_at_a_time_share_the_machine(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def end_a():
        wait_until(lambda: len(started(tmp_path)) == 4)
        os.kill(int(started(tmp_path, 1)[started(tmp_path).index("a")]), signal.SIGTERM)

    threading.Thread(target=end_a).start()
    found = [stub(tmp_path, "a", 600), *(stub(tmp_path, name) for name in "bcd")]
    failed = sweep_jobs.run_missing(found, Workers(2))
    assert failed == {"a": f"stub.py ended with exit status 130 ({tmp_path}/logs/a.log)"}
    assert set(started(tmp_path, 2)) == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    assert "output of" not in capfd.readouterr().err

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [Workers(3)._share(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert Workers(2)._share(1) == {"CUDA_VISIBLE_DEVICES": "GPU-7"}
    assert Workers(1)._share(0) == {}


def test_a_run_that_another_process_works_on_is_skipped(tmp_path, capsys):
    found = [stub(tmp_path, "a", seconds=1), stub(tmp_path, "b")]
    other = in_another_process(sweep_jobs.run_missing, found[:1], Workers())
    wait_until(lambda: started(tmp_path))
    assert sweep_jobs.run_missing(found, Workers()) == sweep_jobs.print_commands(found) == {}
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["a (1 of 2)", "b (2 of 2)", "a: another process is working on this run, skipped here"]
    assert sweep_jobs.what_is_finished(found, tmp_path) == f"1 of 2 runs are finished, in {tmp_path}"
    other.join()
    assert started(tmp_path) == ["a", "b"]
    assert sweep_jobs.what_is_finished(found, tmp_path) == f"all 2 runs are finished, in {tmp_path}"


def test_a_run_that_finds_its_folder_locked_is_skipped_too(tmp_path, capsys):
    """Another process has taken the lock between the sweep's look and the run's own."""
    taken = workers.locked(tmp_path / "a" / "run.lock")
    threading.Thread(target=lambda: (wait_until(lambda: started(tmp_path)), taken.__enter__())).start()
    assert sweep_jobs.run_missing([stub(tmp_path, "a", 1, status=1, script="run_clm.py")], Workers()) == {}
    assert "skipped" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="nothing ends a killed sweep's run elsewhere")
def test_a_killed_sweep_ends_its_run_and_the_next_one_continues(tmp_path):
    killed = in_another_process(sweep_jobs.run_missing, [stub(tmp_path, "a", 600)], Workers())
    wait_until(lambda: started(tmp_path))
    killed.kill()
    killed.join()
    wait_until(lambda: not is_running(*started(tmp_path, 1)))
    assert (tmp_path / "a.heard").read_text() == "SIGTERM"
    assert sweep_jobs.run_missing([stub(tmp_path, "a")], Workers()) == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_runs_hear_once_of_what_the_terminal_tells_all_processes(tmp_path, number):
    def work():
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            sweep_jobs.run_missing([stub(tmp_path, name, 600) for name in "abc"], Workers(2))
        os._exit(7)

    worker = in_another_process(work)
    wait_until(lambda: len(started(tmp_path)) == 2)
    os.killpg(worker.pid, number)
    worker.join()
    assert worker.exitcode == 7
    assert [(tmp_path / f"{name}.heard").read_text() for name in "ab"] == ["SIGTERM"] * 2
    assert sorted(started(tmp_path)) == ["a", "b"]


def test_a_run_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "GRACE", 1)

    def interrupt():
        wait_until(lambda: started(tmp_path))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        sweep_jobs.run_missing([stub(tmp_path, "a", 600, "stubborn")], Workers())
    assert not is_running(*started(tmp_path, 1))


@needs_submitit
def test_a_job_array_is_requeued_at_its_limit_and_resumes(tmp_path, monkeypatch, capsys):
    cluster, folder = StandInSlurm(tmp_path), tmp_path / "a sweep"
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)  # not where this package is
    found = [stub(folder, "a", 600, steps=2), stub(folder, "b", status=3)]

    def submit() -> list[str]:
        slurm.submit(sweep_jobs.tasks(found, {}), folder, {"partition": "gpu", "gpus_per_node": 1, "licenses": "x"})
        return capsys.readouterr().out.splitlines()

    assert submit()[:2] == ["a: submitted as job 101_0", "b: submitted as job 101_1"]
    flags = [line.removeprefix("#SBATCH --") for line in cluster.script().splitlines()]
    expected = {"array=0-1%2", "partition=gpu", "gpus-per-node=1", "licenses=x", "requeue", "signal=USR2@150"}
    assert expected <= set(flags)
    wait_until(lambda: cluster.queued() == ["101_0"] and "a" in started(folder))
    cluster.install("sbatch", FULL)
    with pytest.raises(RunError, match="slurm did not take the runs: sbatch: error: no more jobs"):
        submit()
    ended = f"b: job 101_1 ended before its work was done, see {folder}/logs/b.log"
    assert capsys.readouterr().out.splitlines() == ["a: is job 101_0 in slurm's queue", ended]

    (folder / "stub.py").write_text(STUB.replace("float(seconds)", "0"))
    cluster.warn("101_0", signal.SIGUSR2)
    wait_until(lambda: not cluster.queued())
    assert (folder / "a.heard").read_text() == "SIGTERM"
    assert sorted(started(folder)) == ["a", "a", "a1", "b"]
    assert missing(found) == ["b"]


@needs_submitit
def test_without_slurm_or_submitit_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RunError, match="no slurm on this machine"):
        slurm.submit([], tmp_path, {})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(RunError, match="pip install submitit"):
        slurm.submit([], tmp_path, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ratios", "0.5,1"], "at least 0 and below 1"),
        (["--ratios", "half"], "half"),
        (["--methods", "magic"], "--methods magic: choose from full_attention, kv_compression"),
        (["--protocols", "matched,fair"], "--protocols fair: choose from paper, matched"),
        (["--seeds", "-1"], "--seed must be at least 0"),
        (["--claims", "3"], "--claims must be 1 or 1,2"),
        (["--jobs", "0"], "at least 1, got 0"),
        (["--slurm", "--preset", "auto"], "--slurm needs --preset"),
        (["--slurm", "--jobs", "2"], "array_parallelism"),
        (["--slurm_option", "partition=gpu"], "needs --slurm"),
        (["--slurm", "--slurm_option", "partition"], "must be KEY=VALUE"),
        (["--slurm", "--slurm_option", "time=1-00:00"], "must be a number of minutes"),
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
    monkeypatch.setattr(sweep_jobs, "run_missing", None)
    assert run(script, "--preset", "embedded", *flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(capsys, tmp_path):
    (tmp_path / "logs").write_text("a file")
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
    (folder / "full_attention_0.0").mkdir()
    with workers.locked(folder / "full_attention_0.0" / "run.lock"):
        assert run(script, *flags, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [shlex.join(command) for command in commands[2:]]
    assert run(script, *flags, "--dry-run", "--claims", "1,2", "--num_documents", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    programs = [[Path(part.split()[1]).name for part in line.split(" && ")] for line in lines]
    assert programs == [["run_clm.py", "generate_c4.py", "eval_generation.py"]] * 3


@pytest.fixture
def in_this_process(tiny_scorers, monkeypatch) -> list[str]:
    """Scripts are called without a process each, their scorers tiny; returns the names of those that were called."""
    called = []

    def carry_out(self, task, slot):
        for command in task.commands:
            name = Path(command[1]).stem
            called.append(name)
            modules = {"run_clm": run_clm, "generate_c4": generate_c4, "eval_generation": eval_generation}
            if status := run(modules[name], *command[2:]):
                raise RunError(f"{name}.py ended with exit status {status}")
        yield

    monkeypatch.setattr(Workers, "_carry_out", carry_out)
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
    flags += ["--num_continuations", "2", "--prefix_words", "20", "--continuation_words", "4"]
    in_this_process.clear()
    assert run(script, *flags) == 0
    assert in_this_process == ["generate_c4", "eval_generation"] * 3
    in_this_process.clear()
    assert run(script, *flags) == 0
    assert in_this_process == []

    scores, generated = (
        tmp_path / "sweep" / "kv_compression_0.5" / name for name in ("scores.json", "generation.jsonl")
    )
    write_json(scores, json.loads(scores.read_text()) | {"convention": "another"})
    assert run(script, *flags) == 0
    generated.write_text(generated.read_text().splitlines()[0] + "\n")  # as a killed run leaves it
    assert run(script, *flags) == 0
    assert in_this_process == ["eval_generation", "generate_c4", "eval_generation"]
    in_this_process.clear()
    capsys.readouterr()
    assert run(script, *flags, "--compress_generated", "--dry-run") == 0
    assert capsys.readouterr().out.count("generate_c4.py") == 3
    assert run(script, *flags, "--num_documents", "3") == 1
    assert in_this_process == ["generate_c4"] * 3
    errors = [line for line in capsys.readouterr().err.splitlines() if "ended with" in line]
    assert errors == [f"error: {name}: generate_c4.py ended with exit status 2" for name in trained]


def test_as_a_program_that_is_told_to_end(tiny, tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["sh", str(ROOT / "sweep.sh"), *tiny, "--ratios", "0.5", "--max_train_steps", "100000"]
    command += ["--folder", str(tmp_path)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            training = tmp_path / "full_attention_0.0" / "train.log"
            wait_until(lambda: training.exists() and " loss " in training.read_text())
            assert workers.is_locked(tmp_path / "full_attention_0.0" / "run.lock")
        finally:
            process.terminate()
        out, err = process.communicate()
    assert process.returncode == 130
    assert out.splitlines()[0].startswith("full_attention_0.0 (1 of ")
    *_, of_the_run, of_the_sweep = err.splitlines()
    assert of_the_run.startswith("error: interrupted after step ")
    assert of_the_sweep == "interrupted: the same command continues"
    assert list((tmp_path / "full_attention_0.0" / "checkpoints").iterdir())
