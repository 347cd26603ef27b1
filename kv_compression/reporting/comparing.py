"""Comparisons and verdicts, computed from what was measured; where a value is interpolated, the result says so."""

import math
from collections.abc import Iterable, Sequence
from itertools import chain

import pandas as pd
from scipy import stats

from kv_compression.generation.comparing import FEWEST_DOCUMENTS, bootstrap, paired_p_value
from kv_compression.reporting.collecting import (
    BASELINES,
    FULL,
    GRID,
    KV,
    METHODS,
    METRIC_NAMES,
    NO_SEED,
    PROTOCOLS,
    SINK,
    UNTUNED,
    Group,
    label,
    of_protocol,
    perplexity,
    points,
)

ABOUT_AS_LOW = 1.05  # "about as low as, or lower" is read as: at most this times the baseline's perplexity
SIGNIFICANT = 0.05
TOO_FEW = "too few documents"
STEP = 0.1  # of the ratio, between neighbours on the grid
# About what the paper's recipe comes to: blocks of 256 tokens that it trains on (WikiText-2's 2.4 million, three
# times), and tokens that it is scored on. A run with less than the least share of either is a demonstration.
PAPER_BLOCKS, PAPER_TOKENS, LEAST = 28_000, 280_000, 0.01


def caveat(runs: pd.DataFrame) -> str:
    """A sentence if the run with the least training or the fewest scored tokens is a demonstration, else ""."""
    blocks, tokens = runs.trained_blocks.min(), runs.num_targets.min()
    parts = []
    if blocks < LEAST * PAPER_BLOCKS:
        parts.append(f"trained on {blocks:,.0f} blocks of 256 tokens (the paper's recipe: {PAPER_BLOCKS:,})")
    if tokens < LEAST * PAPER_TOKENS:
        parts.append(f"scored on {tokens:,.0f} tokens (the paper: {PAPER_TOKENS:,})")
    return f"A demonstration, not a measurement: {', '.join(parts)}." if parts else ""


def interval(differences: pd.Series) -> tuple[float, float]:
    """The 95% interval of a mean over seeds, by Student's t; NaN for one seed."""
    count = len(differences)
    if count < 2:
        return math.nan, math.nan
    quantile = round(stats.t.ppf(0.975, count - 1), 3)  # three decimals, as printed tables have it
    half = quantile * differences.std() / math.sqrt(count)
    return differences.mean() - half, differences.mean() + half


def verdict(differences: pd.Series) -> str:
    """Whether the claim holds for nats per token less a baseline's, and whether the interval leaves it open."""
    threshold, (low, high) = math.log(ABOUT_AS_LOW), interval(differences)
    word = "fails" if differences.mean() > threshold else "holds"
    return f"{word}, uncertain" if low <= threshold < high else word


NONE = pd.Series(dtype=float)


def by_point(found: pd.DataFrame, column: str = "nll") -> dict[tuple[str, str, float], pd.Series]:
    """Of `points`: nats per token by seed, for each method, variant and ratio."""
    return {key: own for key, own in found.set_index("seed").groupby(["method", "variant", "ratio"])[column]}


def difference(kv: pd.Series, other: pd.Series) -> pd.Series:
    """KV compression's nats per token less another's, for the seeds that both have."""
    return (kv - other).dropna()


def at_kept_keys(curve: pd.DataFrame, kept: float, seeds: Iterable[int]) -> pd.DataFrame:
    """A method at a mean number of kept keys: `nll`, and the kept keys `below` and `above` it, by seed.

    Only those of the `seeds` that have runs on both sides of `kept`. Linear between the two measured neighbours, which
    should be neighbours on the grid: a seed with a wider gap there counts only if no seed has a narrower one.
    """
    rows = {}
    for seed, own in curve[curve.seed.isin(list(seeds)) & curve.kept_keys_mean.notna()].groupby("seed"):
        runs = list(zip(own.kept_keys_mean, own.nll, own.ratio))
        below = max((run for run in runs if run[0] <= kept), default=None)
        above = min((run for run in runs if run[0] >= kept), default=None)
        if below and above:
            share = (kept - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
            nll = below[1] + share * (above[1] - below[1])
            rows[seed] = nll, below[0], above[0], round(abs(above[2] - below[2]), 6)
    between = pd.DataFrame.from_dict(rows, orient="index", columns=["nll", "below", "above", "gap"], dtype=float)
    return between[between.gap <= max(STEP, between.gap.min())]


def interpolated(name: str, between: pd.DataFrame) -> dict:
    """Columns for an interpolated curve: the perplexity, and the kept keys of its neighbours."""
    columns = {"perplexity": perplexity(between.nll).mean(), "kept_below": between.below.min()}
    columns["kept_above"] = between.above.max()
    return {f"{name}_{column}": value for column, value in columns.items()}


def sinks_beside(sinks: pd.DataFrame, kept: float, kv: pd.Series) -> dict[str, tuple[pd.DataFrame, pd.Series]]:
    """Sink attention beside KV compression at a mean number of kept keys, by variant (the number of sinks).

    For the variants that have runs on both sides of `kept`: what was interpolated, and KV compression's differences to
    it.
    """
    between = {variant: at_kept_keys(curve, kept, kv.index) for variant, curve in sinks.groupby("variant")}
    return {variant: (own, difference(kv, own.nll)) for variant, own in between.items() if len(own)}


def average(found: pd.DataFrame) -> pd.DataFrame:
    """Of `points`, a row per method, variant and ratio: means over seeds, and the range of perplexity."""
    columns = {name: (name, "first") for name in ("number", "fine_tuned", "foreign")} | {"seeds": ("seed", "size")}
    columns |= {name: (name, "mean") for name in ("removed_fraction", "attended_fraction", "kept_keys_mean")}
    columns |= {"kept_keys_max": ("kept_keys_max", "max")}
    over_seeds = {"perplexity": "mean", "perplexity_spread": "std", "lowest": "min", "highest": "max"}
    columns |= {name: ("perplexity", function) for name, function in over_seeds.items()}
    return found.groupby(["method", "variant", "ratio"]).agg(**columns).reset_index()


def describe(group: Group, protocol: str) -> list[dict]:
    """One row per point: its means over seeds, and its distance to full attention and to sinks of equal kept keys."""
    found = points(group, protocol)
    nats, untrained = by_point(found), by_point(found, "untrained")
    nothing = found[["nll"]].head(0).assign(below=math.nan, above=math.nan), NONE
    rows = []
    for point in average(found).drop(columns=["foreign", "lowest", "highest"]).to_dict("records"):
        method, variant, ratio, kept = (point[name] for name in ("method", "variant", "ratio", "kept_keys_mean"))
        own, alike = nats[method, variant, ratio], "" if point["fine_tuned"] else UNTUNED
        sinks = found[(found.method == SINK) & (found.fine_tuned == point["fine_tuned"])]
        beside = sinks_beside(sinks, kept, own) if method == KV else {}
        best = max(beside, key=lambda variant: beside[variant][1].mean(), default=None)  # KV compares worst with it
        before = untrained[method, variant, ratio].dropna()
        if not len(before):
            before = nats.get((method, ", ".join(filter(None, [variant, UNTUNED])), ratio), NONE)
        point["nats_above_full"] = difference(own, nats.get((FULL, alike, 0.0), NONE)).mean()
        point["untrained_perplexity"] = perplexity(before).mean()
        for name, chosen in (("sink", alike), ("best_sink", best)):
            between, differences = beside.get(chosen, nothing)
            point |= interpolated(name, between) | {f"difference_to_{name}": differences.mean()}
        rows.append({"protocol": protocol} | point | {"best_sink_variant": best})
    return rows


def judge_claim_1(group: Group, protocol: str) -> list[dict]:
    """KV compression against every baseline at every ratio that both have, one row per comparison."""
    found = points(group, protocol)
    nats, removed = by_point(found), {key: own.mean() for key, own in by_point(found, "removed_fraction").items()}
    rows = []
    for baseline in BASELINES:
        for method, variant, ratio in nats:
            kv, other = (method, variant, ratio), (baseline, variant, ratio)
            if method == KV and not variant and other in nats:
                columns = {"kv_removed": removed[kv], "baseline_removed": removed[other]}
                rows += _judge(PROTOCOLS[protocol], baseline, ratio, nats[kv], nats[other], columns)
    return rows


def judge_kept_keys(group: Group, protocol: str) -> list[dict]:
    """KV compression against every baseline, interpolated to the same mean number of kept keys."""
    found = points(group, protocol)
    nats = by_point(found)
    plain = found[found.variant == ""]
    kept_keys = plain[plain.method == KV].groupby("ratio").kept_keys_mean.mean().dropna()
    rows = []
    for baseline in BASELINES:
        curve = plain[plain.method == baseline]
        for ratio, kept in kept_keys.items():
            kv = nats[KV, "", ratio]
            between = at_kept_keys(curve, kept, kv.index)
            columns = {"kept_keys": kept} | interpolated("baseline", between)
            rows += _judge(f"equal kept keys, {protocol}", baseline, ratio, kv, between.nll, columns)
    return rows


def _judge(comparison: str, baseline: str, ratio: float, kv: pd.Series, others: pd.Series, columns: dict) -> list[dict]:
    """The row of one comparison, with more `columns`; no row if they have no seed in common."""
    differences = difference(kv, others)
    if not len(differences):
        return []
    low, high = interval(differences)
    row = {"comparison": comparison, "baseline": baseline, "ratio": ratio, "seeds": len(differences)}
    row["kv_perplexity"] = perplexity(kv[differences.index]).mean()
    row["baseline_perplexity"] = perplexity(others[differences.index]).mean()
    row |= {"difference": differences.mean(), "spread": differences.std(), "low": low, "high": high}
    row |= {"times": perplexity(differences.mean()), "verdict": verdict(differences)}
    return [row | columns]


def judge_claim_2(scores: pd.DataFrame, protocol: str) -> list[dict]:
    """KV compression's continuations against every baseline's, document by document: one row per metric and ratio."""
    scores = scores[scores.variant == ""]
    found = of_protocol(scores, protocol)
    rows = []
    for baseline in BASELINES:
        for ratio in sorted(set(found.ratio)):
            kv, other = (found[(found.method == one) & (found.ratio == ratio)] for one in (KV, baseline))
            common = set(kv.seed) & set(other.seed)
            for metric in METRIC_NAMES:
                ours, theirs = (by_document(one[one.seed.isin(common)], metric) for one in (kv, other))
                both = pd.DataFrame({"ours": ours, "theirs": theirs}).dropna()
                if not len(both):
                    continue
                estimate, p_value = bootstrap(both.ours - both.theirs), paired_p_value(both.ours, both.theirs)
                better = (estimate.mean < 0) == (metric == "perplexity")
                word = "no difference shown" if p_value >= SIGNIFICANT else "holds" if better else "reversed"
                word = TOO_FEW if len(both) < FEWEST_DOCUMENTS else word
                row = {"comparison": PROTOCOLS[protocol], "baseline": baseline, "metric": metric, "ratio": ratio}
                row |= {"documents": len(both), "kv": both.ours.mean(), "baseline_mean": both.theirs.mean()}
                row |= {"difference": estimate.mean, "low": estimate.low, "high": estimate.high}
                rows.append(row | {"p_value": p_value, "verdict": word})
    return rows


def by_document(scores: pd.DataFrame, metric: str) -> pd.Series:
    """One value per document: the mean over the files that scored it."""
    found = pd.concat([pd.DataFrame.from_dict(scored, "index", dtype=float) for scored in scores.by_document] or [NONE])
    return found.groupby(level=0)[metric].mean() if metric in found else NONE


def missing(rows: pd.DataFrame) -> list[str]:
    """What a grid of methods, ratios, seeds and protocols still lacks, of runs or of scored files, in lines of text."""
    plain = rows[rows.variant == ""]
    have = {
        protocol: set(zip(found.method, found.ratio, found.seed))
        for protocol in PROTOCOLS
        if (rows.protocol == protocol).any()
        for found in [of_protocol(plain.dropna(subset={f"nats_{protocol}"} & {*rows}), protocol)]
    }
    lines = []
    for method in METHODS:
        wanted = (0.0,) if method == FULL else GRID
        for seed in sorted(set(rows.seed)):
            lacking: dict[str, list[str]] = {}
            for protocol, found in have.items():
                ratios = ranges(ratio for ratio in wanted if (method, ratio, seed) not in found)
                lacking.setdefault(ratios, []).append(protocol)
            lines += [
                f"{label(method)}, {' and '.join(protocols)}, seed {'-' if seed == NO_SEED else seed}: {ratios}"
                for ratios, protocols in lacking.items()
                if ratios
            ]
    return lines


def ranges(ratios: Iterable[float]) -> str:
    """Ratios as text, neighbours on the grid joined: 0.1 – 0.4, 0.6."""
    rows: list[list[float]] = []
    for ratio in sorted(ratios):
        if rows and round(ratio - rows[-1][-1], 6) == STEP:
            rows[-1].append(ratio)
        else:
            rows.append([ratio])
    parts = [[f"{row[0]:g} – {row[-1]:g}"] if len(row) > 2 else [f"{ratio:g}" for ratio in row] for row in rows]
    return ", ".join(chain(*parts))


def conclude(rows: Sequence[dict], verdicts: Sequence[str], what: str = "measured") -> str:
    """At which ratios each verdict was reached, and what of the grid was not measured."""
    parts = []
    for word in verdicts:
        those = [row for row in rows if row["verdict"].startswith(word)]
        uncertain = ranges(row["ratio"] for row in those if row["verdict"].endswith("uncertain"))
        if those:
            aside = f" (uncertain at {uncertain})" if uncertain else ""
            parts.append(f"{word} at {ranges(row['ratio'] for row in those)}{aside}")
    ratios = {row["ratio"] for row in rows}
    rest = [ratio for ratio in GRID if ratio not in ratios]
    parts.append(f"{len(GRID) - len(rest)} of {len(GRID)} ratios {what}")
    return "; ".join(parts + [f"not {what}: {ranges(rest)}"] * bool(rest)) + "."
