"""Results and scores that are made up, in the files that runs and scorers leave."""

import json
import math
from pathlib import Path

import numpy as np

from kv_compression.generation import scorers
from kv_compression.reporting import collecting

BASELINES = ("local_attention", "scattered_attention", "sink_attention")
# Nats above full attention, at a ratio: so that every method has a shape of its own.
SLOPES = {"full_attention": 0, "kv_compression": 1, "local_attention": 1.5, "scattered_attention": 2.5}


def results(method="kv_compression", ratio=0.5, protocol="matched", seed=0, nll=None, kept=None, **settings) -> dict:
    """What a results.json holds; `settings` beyond those of every run here make variants or groups."""
    nll = 3 + SLOPES.get(method, 1.2) * ratio + 0.01 * seed if nll is None else nll
    made = {"method": method, "bound_ratio": ratio, "protocol": protocol, "preset": "embedded", "seed": seed}
    made |= {"eval_only": settings.get("eval_only", False), "perplexity": math.exp(nll), "nll": nll}
    made |= {"nll_per_token": nll, "nll_per_batch": nll + 0.001, "removed_fraction": ratio}
    made |= {"attended_fraction": 1 - ratio, "kept_keys_mean": 128 * (1 - ratio) if kept is None else kept}
    made |= {"kept_keys_max": 256, "untrained": {"nll_per_token": nll + 1, "nll_per_batch": nll + 1}}
    shared = {"model_name_or_path": "a/tiny", "test_file": "test.txt sha256:0", "learning_rate": 1e-3}
    return made | {"settings": shared | settings}


def scores(method, ratio=0.5, better=0.0, count=20, **changes) -> dict:
    """What a scores.json holds: documents whose scores are all `better` than another file's, but for noise."""
    noise = np.random.default_rng(len(method)).normal(0, 0.01, count)
    documents = {
        str(index): {"rouge_l": 0.2 + better + e, "bertscore": 0.5 + better + e, "perplexity": 50 - 100 * better + e}
        for index, e in enumerate(noise)
    }
    means = {name: float(np.mean([found[name] for found in documents.values()])) for name in documents["0"]}
    made = {"method": method, "bound_ratio": ratio, "protocol": "matched", "preset": "embedded"}
    made |= {"documents_sha256": "d0c5", "bertscore_model": "encoder", "bertscore_layer": 6, "fluency_model": "model"}
    made |= {"convention": scorers.CONVENTION, "cache_fraction": 1 - ratio, "documents": documents}
    made |= {name: {"mean": value, "low": value - 0.01, "high": value + 0.01} for name, value in means.items()}
    return made | changes


def write(folder: Path, *contents: dict) -> Path:
    """A folder for each of the contents, named so that they sort as given."""
    for number, content in enumerate(contents):
        put(folder / f"{number:03}" / ("results.json" if "settings" in content else "scores.json"), content)
    return folder


def put(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def group_of(folder: Path, *contents: dict) -> collecting.Group:
    (group,) = collecting.collect(write(folder, *contents)).groups
    return group


def grid(
    methods=("kv_compression", *BASELINES), ratios=collecting.GRID, seeds=(0,), protocols=("matched",)
) -> list[dict]:
    """A sweep; methods without sentinels run once, under the last protocol."""
    runs = [results("full_attention", 0.0, protocols[-1], seed) for seed in seeds]
    for method in methods:
        for protocol in protocols if method == "kv_compression" else protocols[-1:]:
            runs += [results(method, ratio, protocol, seed) for ratio in ratios for seed in seeds]
    return runs
