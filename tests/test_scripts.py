"""The shell scripts, with a stand-in for Python that writes down how it is called."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.sh"))
METHODS = ["kv_compression", "local_attention", "sink_attention", "scattered_attention"]

STAND_IN = """#!/bin/sh
case $1 in
-) echo "$@" >>"{log}.asked"; exit {has_packages} ;;
-m) case $2 in venv) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;; esac ;;
esac
echo "$@" >>"{log}"
case $1 in *run_clm.py) exit {status} ;; esac
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts and a way to run them with a Python that only notes its arguments."""
    for name in [*SCRIPTS, "requirements.txt", "requirements-dev.txt", "requirements-embedded.txt"]:
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    log = tmp_path / "calls"

    def run(*command, has_packages=True, status=0):
        for name in ("python3", "python", "python3.11", "python3.12", "python3.13"):
            stand_in = tmp_path / "bin" / name
            stand_in.write_text(STAND_IN.format(has_packages=int(not has_packages), log=log, status=status))
            stand_in.chmod(0o755)
        log.write_text("")
        shell = shutil.which("dash") or "sh"
        environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run([shell, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done, log.read_text().splitlines()

    return run


def test_scripts_are_executable():
    assert SCRIPTS
    for path in [ROOT / name for name in SCRIPTS]:
        assert path.stat().st_mode & 0o111 == 0o111, path.name


@pytest.mark.parametrize("method", METHODS)
def test_a_method_script_passes_ratio_and_flags_on(project, tmp_path, method):
    done, calls = project(f"run_clm_{method}.sh", "0.5", "--seed", "3", "--output_dir", "a b")
    assert done.returncode == 0
    assert calls == [f"{tmp_path}/run_clm.py --method {method} --bound_ratio 0.5 --seed 3 --output_dir a b"]
    assert project(f"run_clm_{method}.sh", "0.5", status=1)[0].returncode == 1


@pytest.mark.parametrize(
    "ratio", [[], ["abc"], ["1"], ["1.0"], ["-0.5"], ["nan"], ["0.5.5"], ["."], [""], ["0.5x"], ["0;id"], ["0$(id)"]]
)
@pytest.mark.parametrize("script", ["run_clm_kv_compression.sh", "quickstart.sh"])
def test_a_bad_ratio_prints_usage_and_exits_2(project, script, ratio):
    if script == "quickstart.sh" and not ratio[:1]:
        return  # its ratio may be left out
    done, calls = project(script, *ratio)
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: sh {script}")
    assert len(done.stderr.splitlines()) == 1
    assert calls == []


@pytest.mark.parametrize("ratio", ["0", "0.0", "0.9", ".25"])
def test_good_ratios(project, ratio):
    assert project("run_clm_local_attention.sh", ratio)[0].returncode == 0


def test_an_environment_is_made_once_if_the_active_python_lacks_packages(project, tmp_path):
    done, calls = project("run_clm_local_attention.sh", "0.5", has_packages=False)
    # The stand-in is recent enough only if it answers, so a bare machine is told what it needs.
    assert done.returncode == 1
    assert "Python 3.11 or later" in done.stderr
    assert calls == []

    stand_in = tmp_path / "bin" / "python3"
    stand_in.write_text(stand_in.read_text().replace("; exit 1 ;;", '; [ "$2" ] && exit 1; exit 0 ;;', 1))
    frozen = stand_in.read_text()

    def again():
        stand_in.write_text(frozen)
        environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
        command = ["sh", "run_clm_local_attention.sh", "0.5"]
        (tmp_path / "bin" / "python").write_text(frozen)
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = again()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert done.returncode == 0, done.stderr
    assert "Setting up" in done.stderr
    assert "Step 2 of 2" in done.stderr
    assert not any("--quiet" in call for call in calls)
    assert calls[0] == f"-m venv {tmp_path}/.venv"
    assert "requirements.txt" in calls[1]
    assert "--no-deps" in calls[2]
    assert "requirements-embedded.txt" in calls[2]
    assert calls[3].startswith(f"{tmp_path}/run_clm.py")
    done = again()
    assert done.stderr == ""
    assert len((tmp_path / "calls").read_text().splitlines()) == 5

    (tmp_path / "requirements.txt").write_text("torch==99\n")  # other pins: set up again
    assert "Setting up" in again().stderr


def test_an_old_python3_gives_way_to_a_newer_python(project, tmp_path):
    project("run_clm_local_attention.sh", "0.5", has_packages=False)  # writes the stand-ins, all of them too old
    newer = tmp_path / "bin" / "python3.11"
    newer.write_text(newer.read_text().replace("; exit 1 ;;", '; [ "$2" ] && exit 1; exit 0 ;;', 1) + "# newer\n")
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        ["sh", "run_clm_local_attention.sh", "0.5"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".venv/bin/python").read_text().endswith("# newer\n")


def test_quickstart_runs_what_is_missing_and_keeps_its_summary(project, tmp_path):
    done, calls = project("quickstart.sh", "0.3")
    runs, generations, (table, scores, ending) = calls[:6], calls[6:12], calls[12:]
    told = done.stdout.splitlines()
    assert [line for line in told if line.startswith("Run ")][::5] == [
        "Run 1 of 6: full_attention 0.0",
        "Run 6 of 6: scattered_attention 0.3",
    ]
    assert "Claim 1: test perplexity after fine-tuning" in told
    methods = [call[call.index("--method") :].split()[1] for call in runs]
    assert methods == ["full_attention", "kv_compression", *METHODS]
    ratios = [call[call.index("--bound_ratio") :].split()[1] for call in runs]
    assert ratios == ["0.0", *["0.3"] * 5]
    assert [call.split()[-2:] == ["--recipe", "best"] for call in runs] == [False, False, True, False, False, False]
    assert all("--preset embedded" in call and "--resume_from_checkpoint" in call for call in runs)
    folders = [call[call.index("--output_dir") :].split()[1] for call in runs]
    assert len(set(folders)) == 6
    assert table == "-m kv_compression.io.results " + " ".join(folders)
    assert ending == "-m kv_compression.reporting.quickstart " + " ".join(folders)
    assert [call.split()[2] for call in generations] == folders
    assert scores.split()[1:7] == [f"{folder}/generation.jsonl" for folder in folders]
    again, calls = project("quickstart.sh", "0.3")
    assert calls == []
    assert done.stdout.endswith("\n" + again.stdout)
    for folder in folders[:4]:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "results.json").write_text("{}")
    (tmp_path / "output/embedded/quickstart/summary_0.3.txt").unlink()
    done, calls = project("quickstart.sh", "0.3")
    assert calls == [*runs[4:], *generations, table, scores, ending]
    assert done.stdout.startswith("Run 5 of 6: sink_attention 0.3\n")


@pytest.mark.parametrize("flags", [[], ["0.4"]])
def test_a_quickstart_that_stops_says_how_to_continue(project, tmp_path, flags):
    done, calls = project("quickstart.sh", *flags, status=130)
    assert done.returncode == 130
    assert len(calls) == 1
    assert done.stderr == " ".join(["stopped; sh quickstart.sh", *flags, "continues from here\n"])
    assert not list(tmp_path.glob("output/embedded/quickstart/summary_*"))


def test_a_key_ends_the_quickstart_and_the_same_command_continues(project, tmp_path):
    project("quickstart.sh", "0")  # writes the stand-ins
    log = tmp_path / "calls"
    log.write_text("")
    waits = (tmp_path / "bin" / "python3").read_text().replace("run_clm.py) exit 0", "run_clm.py) sleep 60")
    (tmp_path / "bin" / "python3").write_text(waits)
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [shutil.which("dash") or "sh", "quickstart.sh", "0.4"]
    started = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 30
    while "run_clm.py" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does
    assert started.wait(30) == 130
    assert started.stderr.read() == "stopped; sh quickstart.sh 0.4 continues from here\n"
    done, calls = project("quickstart.sh", "0.4")
    assert done.returncode == 0
    assert "--resume_from_checkpoint" in calls[0]


@pytest.mark.parametrize(
    ("flags", "scores_text"),
    [
        ([], False),
        (["--claims", "1", "--seeds", "2"], False),
        (["--claims=1", "--ratios", "0.2"], False),
        (["--claims", "1,2"], True),
        (["--seeds", "0", "--claims", "1", "2", "--ratios", "0.5"], True),
        (["--claims=1,2"], True),
        (["--claims", "1", "--slurm", "--preset", "paper", "--seeds", "2"], False),
    ],
)
def test_a_sweep_asks_only_for_the_packages_that_it_needs(project, tmp_path, flags, scores_text):
    done, calls = project("sweep.sh", *flags)
    assert done.returncode == 0
    assert calls == [" ".join([f"{tmp_path}/sweep.py", *flags])]
    packages = (tmp_path / "calls.asked").read_text()
    assert ("bert-score" in packages, "submitit" in packages) == (scores_text, "--slurm" in flags)
