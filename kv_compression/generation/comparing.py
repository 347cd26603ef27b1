"""Scores side by side: means with their intervals, differences between files with p-values, and the table.

Knows scores alone, and loads no torch.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kv_compression.io import tables
from kv_compression.io.errors import printable

METRICS = ("rouge_l", "bertscore", "perplexity")
RESAMPLES = 10_000
FEWEST_DOCUMENTS = 6  # that can show a difference: with five no p-value can fall below 0.05
SAME = ("documents_sha256", "bertscore_model", "bertscore_layer", "fluency_model")  # in files that can be compared


@dataclass(frozen=True)
class Estimate:
    """A mean over documents and its 95% confidence interval (bootstrap over documents)."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean over documents of one value per document, with the interval that resampling documents gives."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), size=(RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def paired_p_value(first: Sequence[float], second: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value that two methods' scores on the same documents differ by chance alone.

    A permutation test: the sign of every document's difference is flipped at random.
    """
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if not len(differences):
        return math.nan
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(RESAMPLES, len(differences)))
    extreme = np.abs((signs * differences).mean(1)) >= abs(differences.mean()) - 1e-12
    return float((extreme.sum() + 1) / (RESAMPLES + 1))


def least_p_value(documents: int) -> float:
    """The smallest `paired_p_value` that this many documents can have: all differences have one sign."""
    return min(2.0 ** (1 - documents), 1.0)


def comparisons(scored: dict[Path, dict]) -> list[str]:
    """One line for every two methods at one ratio on the same documents: the differences of means, and their p-values.

    Methods are not compared on fewer than `FEWEST_DOCUMENTS`; a last line says so.
    """
    lines, too_few, names = [], 0, names_of(scored)
    for (path, one), (other_path, other) in itertools.combinations(scored.items(), 2):
        if not are_comparable(one, other):
            continue
        common = len(one["documents"].keys() & other["documents"].keys())
        if common < FEWEST_DOCUMENTS:
            too_few = max(too_few, common)
            continue
        ratio = max(scores.get("bound_ratio") or 0 for scores in (one, other))
        lines.append(f"{names[path]} − {names[other_path]} at {ratio}: {', '.join(differences_of_means(one, other))}")
    if too_few:
        least = f"{least_p_value(too_few):g}"
        lines.append(f"differences are not tested: with {too_few} documents no p-value can fall below {least}")
    return lines


def are_comparable(one: dict, other: dict) -> bool:
    """Whether two files hold different methods, scored alike on the same documents at one ratio.

    Full attention, which has no ratio, is compared at any.
    """
    methods = [scores.get("method") for scores in (one, other)]
    if None in methods or methods[0] == methods[1] or one.get("documents_sha256") is None:
        return False
    same = SAME if "full_attention" in methods else (*SAME, "bound_ratio")
    return all(one.get(name) == other.get(name) for name in same)


def differences_of_means(one: dict, other: dict) -> list[str]:
    """The difference of each metric's means over the documents that both files score, with its p-value."""
    parts = []
    for metric in METRICS:
        both = [
            (found[metric], other["documents"][index][metric])
            for index, found in one["documents"].items()
            if metric in found and metric in other["documents"].get(index, {})
        ]
        if both:
            first, second = zip(*both)
            difference = (sum(first) - sum(second)) / len(both)
            parts.append(f"{metric} {difference:+.4f} (p = {paired_p_value(first, second):.4f})")
    return parts


def names_of(scored: dict[Path, dict]) -> dict[Path, str]:
    """What each file is called: its method, and the file's name if several have that method and ratio."""

    def method_and_ratio(scores: dict) -> tuple:
        return scores.get("method"), scores.get("bound_ratio")

    counts = Counter(map(method_and_ratio, scored.values()))
    names = {}
    for path, scores in scored.items():
        file = path.parent.name if path.name == "generation.jsonl" else f"{path.parent.name}/{path.name}"
        names[path] = printable(f"{scores.get('method')}" + f" ({file})" * (counts[method_and_ratio(scores)] > 1))
    return names


def row(path: Path, scores: dict) -> dict:
    """A file's row of the table: all its numbers by column."""
    line = {name: scores.get(name) for name in ("method", "bound_ratio", "num_documents", "cache_fraction")}
    for metric in METRICS:
        for name, value in scores[metric].items():
            line[metric if name == "mean" else f"{metric}_{name}"] = value
    return line | {"perplexity_token_weighted": scores["perplexity_token_weighted"], "file": str(path)}


def as_text(table: list[dict], names: dict[Path, str]) -> str:
    """The table as text, with the files' `names`: means with 95% confidence intervals."""

    def estimate(metric: str, digits: int):
        return lambda line: tables.estimate(line[metric], line[f"{metric}_low"], line[f"{metric}_high"], digits)

    columns = {
        "method": lambda line: names[Path(line["file"])],
        "ratio": lambda line: line["bound_ratio"],
        "documents": lambda line: line["num_documents"],
        "cache": lambda line: tables.figure(line["cache_fraction"], 3),
        "ROUGE-L": estimate("rouge_l", 4),
        "BERTScore": estimate("bertscore", 4),
        "perplexity": estimate("perplexity", 1),
        "token-weighted": lambda line: tables.figure(line["perplexity_token_weighted"], 1),
    }
    return tables.text_table(columns, sorted(table, key=lambda line: (str(line["method"]), line["bound_ratio"] or 0)))
