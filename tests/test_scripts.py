"""The shell scripts, with a stand-in for Python that writes down how it is called."""

import shutil
import subprocess
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
        for name in ("python3", "python"):
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


def test_quickstart_runs_what_is_missing_and_keeps_its_summary(project, tmp_path):
    done, calls = project("quickstart.sh", "0.3")
    runs, generations, (table, scores) = calls[:5], calls[5:10], calls[10:]
    assert done.stdout.splitlines()[0].startswith("Claim 1")
    assert [call.split()[4] for call in runs] == ["full_attention", *METHODS]
    assert all("--preset embedded" in call for call in runs)
    assert [call.split()[6] for call in runs] == ["0.0", *["0.3"] * 4]
    folders = [call.split()[-1] for call in runs]
    assert table == "-m kv_compression.results " + " ".join(folders)
    assert [call.split()[2] for call in generations] == folders
    assert scores.split()[1:6] == [f"{folder}/generation.jsonl" for folder in folders]
    again, calls = project("quickstart.sh", "0.3")
    assert calls == []
    assert again.stdout == done.stdout
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "results.json").write_text("{}")
    (tmp_path / "output/embedded/quickstart/summary_0.3.txt").unlink()
    assert project("quickstart.sh", "0.3")[1] == [*generations, table, scores]
    assert project("quickstart.sh", "0.4", status=1)[0].returncode == 1
    assert not list(tmp_path.glob("output/embedded/quickstart/summary_0.4*"))


@pytest.mark.parametrize(
    ("flags", "scores_text"),
    [
        ([], False),
        (["--claims", "1", "--seeds", "2"], False),
        (["--claim_timeout", "20"], False),
        (["--claims=1", "--ratios", "0.2"], False),
        (["--claims", "1,2"], True),
        (["--seeds", "0", "--claims", "1", "2", "--ratios", "0.5"], True),
        (["--claims=1,2"], True),
    ],
)
def test_a_sweep_asks_for_scorers_only_where_claim_2_is_asked_for(project, tmp_path, flags, scores_text):
    done, calls = project("sweep.sh", *flags)
    assert done.returncode == 0
    assert calls == [" ".join([f"{tmp_path}/sweep.py", *flags])]
    assert ("bert-score" in (tmp_path / "calls.asked").read_text()) == scores_text
