"""What must not happen, whoever has made the files: nothing is unpickled or run, and names of files are plain."""

import ast
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers

from kv_compression import settings as run_settings
from kv_compression.generation.records import scores_path
from kv_compression.io.errors import RunError
from kv_compression.io.ownership import file_name
from kv_compression.io.results import write_json
from kv_compression.methods import METHODS
from kv_compression.model import lora
from kv_compression.sweep.plan import plan
from kv_compression.training import loading, run_folder
from tests import made_results

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "kv_compression").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
NEVER_IMPORTED = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "yaml"}
NEVER_CALLED = {
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "import_module",
        "os.system",
        "os.popen",
        "torch.load",
        "torch.hub.load",
    ),
    *("np.load", "numpy.load", "pandas.read_pickle", "subprocess.getoutput", "subprocess.getstatusoutput"),
}
PLAIN = re.compile(r"[A-Za-z0-9._-]+")


def offences(source: str) -> list[str]:
    """What the source does that no source of this project may do."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(name.name for name in node.names)]
            found += [name for name in names if name.split(".")[0] in NEVER_IMPORTED]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] * (name in NEVER_CALLED or name.startswith(("os.exec", "os.spawn")))
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                forbidden = {"shell": value != "False", "trust_remote_code": value != "False"}
                forbidden |= {"weights_only": value != "True", "allow_pickle": value != "False"}
                found += [f"{keyword.arg}={value}"] * forbidden.get(keyword.arg, False)
    return found


def test_no_source_unpickles_runs_a_shell_or_trusts_remote_code():
    assert len(SOURCES) > 30
    assert {str(path.relative_to(ROOT)): found for path in SOURCES if (found := offences(path.read_text()))} == {}
    told = "import pickle\nrun('x', shell=True)\neval('1')\nload(trust_remote_code=flag)\nmodel.eval()"
    assert offences(told) == ["pickle", "shell=True", "eval", "trust_remote_code=flag"]


def test_no_script_evaluates_text():
    for path in ROOT.glob("*.sh"):
        assert not re.search(r"\beval\b|`|\b(?:ba)?sh -c\b", path.read_text()), path.name


class Trap:
    """What makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_weights_of_a_model_run_nothing(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"embed_in.weight": Trap(tmp_path / "sprung")}, folder / "pytorch_model.bin")
    settings = run_settings.Settings(model_name_or_path=str(folder))
    with pytest.raises(RunError, match="cannot be loaded"):
        loading.load_model(settings)
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def finished_run(tiny_model, tmp_path) -> Path:
    """What a run of run_clm.py leaves, untrained."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = {"default": "x", "../a|b": "y", "c\nd": "z"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    model = lora.add_lora(model, lora.lora_targets(model, None), 4)
    run_folder.save_model(model, tokenizer, tmp_path / "run")
    settings = run_settings.resolve(
        {"preset": "embedded", "method": "local_attention", "model_name_or_path": tiny_model}
    )
    write_json(tmp_path / "run" / "results.json", made_results.results() | {"settings": settings.identity()})
    return tmp_path / "run"


def test_an_adapter_is_read_from_safetensors_alone(finished_run, tmp_path, monkeypatch):
    assert loading.load_run(str(finished_run), "no")[2].method == "local_attention"
    weights, config = finished_run / "adapter_model.safetensors", finished_run / "adapter_config.json"

    (tmp_path / "trap.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    told = json.loads(config.read_text())
    for changes in ({"megatron_config": {"a": 1}, "megatron_core": "trap"}, {"peft_type": "XLORA"}):
        config.write_text(json.dumps(told | changes))
        with pytest.raises(RunError, match="the adapter in .* cannot be loaded: run_clm.py did not write it"):
            loading.load_run(str(finished_run), "no")
    assert "trap" not in sys.modules

    config.write_text(json.dumps(told))
    weights.unlink()
    torch.save({"x": Trap(tmp_path / "sprung")}, finished_run / "adapter_model.bin")
    with pytest.raises(RunError, match="there is no adapter_model.safetensors"):
        loading.load_run(str(finished_run), "no")
    assert not (tmp_path / "sprung").exists()


def test_names_of_files_do_not_follow_a_tokenizer(finished_run, tmp_path):
    assert all(PLAIN.fullmatch(path.name) for path in finished_run.rglob("*"))
    assert (finished_run / "chat_template.jinja").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_text_becomes_a_plain_name_of_its_own():
    texts = ["a_b", "a b", "a  b", "a/b", "../x", "x|y\nz", "été", "\udcff", "a;rm -rf b", "$(id)", "-x.1"]
    names = list(map(file_name, texts))
    assert all(PLAIN.fullmatch(name) for name in names)
    assert list(map(file_name, names)) == names
    assert len(set(names)) == len(texts)
    assert (names[0], names[-1]) == ("a_b", "-x.1")


@pytest.mark.parametrize("name", ["a b|c", "été\n", "$(id)", "\udcff"])
def test_names_of_given_files_are_plain_in_results_and_of_scores(name):
    assert PLAIN.fullmatch(scores_path(Path("folder") / f"{name}.jsonl").name)
    assert PLAIN.fullmatch(run_settings.Settings(train_file=f"folder/{name}.txt").identity()["train_file"])


def test_names_made_of_settings_are_plain():
    runs = plan(list(METHODS), [1e-07, 0.1, 0.123456789], [0, 2**32 - 1], ["paper", "matched"])
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    assert all(PLAIN.fullmatch(name) for name in names)
