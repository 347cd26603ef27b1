"""A method in one file: a checkout with one more file in kv_compression/methods/ trains, caches, generates and reports
it, with nothing else changed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import sentences

ROOT = Path(__file__).resolve().parent.parent
EVERY_OTHER = '''"""Every other attention: half of the keys by their place, and the newest four."""

from kv_compression.methods.rule import MaskMod, Rule


class EveryOtherAttention(Rule):
    """A query sees the keys at even places, and the four newest."""

    name = "every_other_attention"
    label = "every other key"
    colour, marker = "#336699", "v"
    card = "A token sees every other token before it, and the newest four."

    def mask_mod(self, input_ids) -> MaskMod:
        return lambda b, h, q, k: (k <= q) & ((k % 2 == 0) | (q - k < 4))
'''
CACHE = """
import torch, transformers
import kv_compression as kvc
from kv_compression.methods import METHODS
from kv_compression.model.cache import SentinelCache
model = transformers.AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.float64).eval()
rule = METHODS["every_other_attention"](ratio=0.5)
ids = torch.arange(5, 45)[None]
with torch.no_grad(), kvc.attach(model, rule=rule):
    one_pass = model(ids, use_cache=False).logits
    cache = SentinelCache(rule=rule)
    cached = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([7, 1, 1, 20, 11], 1)], 1)
print("apart", float((one_pass - cached).abs().max()), "held", cache.length)
"""


def test_a_method_takes_one_file(tiny_model, tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "kv_compression", checkout / "kv_compression", ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, checkout)
    (checkout / "kv_compression" / "methods" / "every_other_attention.py").write_text(EVERY_OTHER)
    for name, count in (("train", 24), ("test", 8)):
        rows = [json.dumps({"text": text}) for text in sentences(count, len(name))]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))

    def run(*command) -> str:
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, command)]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    folder = tmp_path / "output" / "new"
    files = ["--train_file", tmp_path / "train.jsonl", "--test_file", tmp_path / "test.jsonl"]
    tiny = ["--block_size", 32, "--max_train_steps", 2, "--max_eval_blocks", 4, "--mixed_precision", "no"]
    run(
        *["run_clm.py", "--preset", "embedded", "--model_name_or_path", tiny_model, *files, *tiny],
        *["--method", "every_other_attention", "--bound_ratio", 0.5, "--output_dir", folder],
    )
    results = json.loads((folder / "results.json").read_text())
    assert results["method"] == "every_other_attention" and 0.4 < results["attended_fraction"] < 0.7
    card = (folder / "README.md").read_text()
    assert "every other token before it" in card and "every other key" in card

    cached = run("-c", CACHE.format(model=tiny_model)).split()
    assert float(cached[1]) < 1e-9 and cached[3] == "40"

    sampling = ["--prefix_words", 20, "--continuation_words", 5, "--num_continuations", 2, "--mixed_precision", "no"]
    run(
        "generate_c4.py", "--model_dir", folder, "--docs_file", tmp_path / "test.jsonl", "--num_documents", 3, *sampling
    )
    assert len((folder / "generation.jsonl").read_text().splitlines()) == 3
    run("report.py", tmp_path / "output")
    assert "every other key" in (tmp_path / "output" / "report.md").read_text()
