"""How the scripts start: what they say and set before torch is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["run_clm", "generate_c4", "eval_generation", "export_model", "sweep", "report"]
RUN = {"method": "local_attention", "bound_ratio": 0.5, "protocol": "matched", "preset": "embedded", "seed": 0}
RUN |= {"perplexity": 12.0, "removed_fraction": 0.5, "settings": {}}

# Calls a script with a stand-in for a package: whoever imports it first prints the threads' policy and ends.
MEET = """
import json, os, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {package!r}:
            {action}
sys.meta_path.insert(0, Finder())
sys.argv = json.loads(sys.argv[1])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SHOW = "print(os.environ.get('OMP_WAIT_POLICY')); sys.stdout.flush(); os._exit(0)"
LACK = "raise ModuleNotFoundError('No module named ' + repr(name), name=name)"


def call(script: str, *flags, package="torch", action=SHOW, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    program = MEET.format(package=package, action=action)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    arguments = json.dumps([str(ROOT / f"{script}.py"), *map(str, flags)])
    return subprocess.run(
        [sys.executable, "-c", program, arguments],
        cwd=cwd,
        env=plain | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def flags(tmp_path) -> dict[str, list]:
    """Flags with which each script comes to load torch."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(json.dumps(RUN))
    record = {"index": 0, "reference": "so", "continuations": ["and so"], "prefix_tokens": 2, "cache_length": 1}
    (tmp_path / "run" / "generation.jsonl").write_text(json.dumps(record) + "\n")
    return {
        "run_clm": ["--method", "full_attention"],
        "generate_c4": ["--model_dir", tmp_path / "run"],
        "eval_generation": [tmp_path / "run" / "generation.jsonl"],
        "export_model": ["--model_dir", tmp_path / "run", "--output_dir", tmp_path / "out"],
        "sweep": ["--dry-run", "--folder", tmp_path / "sweep"],
        "report": [tmp_path / "run"],
    }


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "report"])
def test_threads_wait_passively_before_torch_is_loaded(flags, script):
    done = call(script, *flags[script])
    assert (done.returncode, done.stdout, done.stderr) == (0, "PASSIVE\n", "")


@pytest.mark.parametrize(
    ("chosen", "policy"),
    [
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        ({"OMP_NUM_THREADS": "1"}, "None"),
        ({"GOMP_SPINCOUNT": "5"}, "None"),
        ({"GOMP_CPU_AFFINITY": "0"}, "None"),
    ],
)
def test_who_has_set_the_threads_keeps_them(flags, chosen, policy):
    assert call("run_clm", *flags["run_clm"], **chosen).stdout == f"{policy}\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_the_environment_the_way_in_is_named(flags, script):
    package = "matplotlib" if script == "report" else "torch"
    done = call(script, *flags[script], package=package, action=LACK)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable} lacks the package {package}: ")
    assert ". .venv/bin/activate" in line or "sh quickstart.sh" in line
    assert "pip install -r requirements.txt" in line


def test_what_is_missing_of_the_project_itself_is_no_such_line():
    script = "from kv_compression.io.errors import run_script\n"
    script += "def main():\n    import kv_compression.nothing\nraise SystemExit(run_script(main))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "ModuleNotFoundError: No module named 'kv_compression.nothing'" in done.stderr


WRONG = [
    ("run_clm", [], "--method is missing: choose from full_attention, kv_compression,"),
    ("run_clm", ["--bound_ratio", "0.5"], "python run_clm.py --method kv_compression --bound_ratio 0.5"),
    ("run_clm", ["--method", "kv_compression", "--ratio", "0.5"], "--ratio: did you mean --bound_ratio?"),
    ("run_clm", ["--method", "kv_compression", "--bound-ratio=0.5"], "--bound-ratio=0.5: did you mean --bound_ratio?"),
    ("run_clm", ["--method", "kv_compression", "--block_size", "1"], "--block_size must be at least 2"),
    (
        "run_clm",
        ["--method", "kv_compression", "--preset", "embedded", "--bound_ratio", "0.99"],
        "do not fit a block of 256",
    ),
    ("run_clm", ["--method", "local_attention", "--sink_tokens", "1"], "is an option of --method kv_compression"),
    ("generate_c4", ["--model_dir", "nowhere"], "--model_dir nowhere is not the output folder of a finished run"),
    ("generate_c4", ["--model_dir", "nowhere", "--top-p", "1"], "--top-p: did you mean --top_p?"),
    ("eval_generation", ["nowhere"], "nowhere: no such file or folder"),
    ("export_model", ["--model_dir", "nowhere", "--output_dir", "x"], "--model_dir nowhere is not the output folder"),
    ("sweep", ["--methods", "magic"], "--methods magic: choose from"),
    ("sweep", ["--ratio", "0.5"], "--ratio: did you mean --ratios?"),
    ("sweep", ["--lr", "1"], "--lr: did you mean --learning_rate?"),
    ("sweep", ["--preset", "embedded", "--learning_rate", "-1"], "--learning_rate must be above 0"),
]


@pytest.mark.parametrize(("script", "flags", "words"), WRONG)
def test_wrong_usage_is_refused_before_torch_is_loaded(tmp_path, script, flags, words):
    done = call(script, *flags, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert words in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_neither_torch_nor_what_stands_on_it(script):
    done = call(script, "--help", package="numpy")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {script}.py")
