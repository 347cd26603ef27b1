"""Comparisons and verdicts, computed from what was measured: nothing is interpolated where it is not said."""

import math
import statistics
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from kv_compression.reporting.collecting import (
    BASELINES,
    FULL,
    GRID,
    KV,
    METHODS,
    METRICS,
    PROTOCOLS,
    SINK,
    UNTUNED,
    Group,
    Point,
    Score,
    mean,
    number,
    number_variants,
    perplexity,
    points,
    select,
    spread,
    variants,
)
from kv_compression.reporting.plotting import label

ABOUT_AS_LOW = 1.05  # "about as low as, or lower" is read as: at most this times the baseline's perplexity
SIGNIFICANT = 0.05
TOO_FEW = "too few documents"
STEP = 0.1  # of the ratio, between neighbours on the grid
# About what the paper's recipe comes to: blocks of 256 tokens that it trains on (WikiText-2's 2.4 million, three
# times), and tokens that it is scored on. A run with less than the least share of either is a demonstration.
PAPER_BLOCKS, PAPER_TOKENS, LEAST = 28_000, 280_000, 0.01
# What this project aims at with its variants, by the share truly removed: `beyond` says of what, as shares.
AIMS = {0.5: {"sink": 1.0, "best_sink": 1.0, "full": 1.15}, 0.9: {"gap": 0.5, "sink": 0.75, "best_sink": 0.75}}
# Student's t at 97.5% by degrees of freedom. Beyond the table its last entry, a little too wide, is used.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def caveat(runs: Iterable[dict]) -> str:
    """A sentence where the least trained or least scored of these results.json is a demonstration, else ""."""
    runs = list(runs)
    blocks = min((found for run in runs if (found := trained_blocks(run)) is not None), default=PAPER_BLOCKS)
    tokens = min((found for run in runs if (found := number(run.get("num_targets"))) is not None), default=PAPER_TOKENS)
    parts = []
    if blocks < LEAST * PAPER_BLOCKS:
        parts.append(f"trained on {blocks:,.0f} blocks of 256 tokens (the paper's recipe: {PAPER_BLOCKS:,})")
    if tokens < LEAST * PAPER_TOKENS:
        parts.append(f"scored on {tokens:,} tokens (the paper: {PAPER_TOKENS:,})")
    return f"A demonstration, not a measurement: {', '.join(parts)}." if parts else ""


def trained_blocks(run: dict) -> float | None:
    """How many blocks of 256 tokens a run has trained on, a block counting as often as it was seen; None if unknown."""
    training, settings = run.get("training"), {"num_processes": 1} | run["settings"]
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes", "block_size")
    steps = number(training.get("steps")) if isinstance(training, dict) else None
    factors = [steps, *(number(settings.get(name)) for name in names)]
    return None if None in factors else math.prod(factors) / 256


@dataclass(frozen=True)
class Difference:
    """KV compression's nats per token less a baseline's, one value a seed that both have."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def interval(self) -> tuple[float, float] | tuple[None, None]:
        """95% by Student's t; of one seed there is none."""
        deviation, count = spread(self.values), len(self.values)
        if deviation is None:
            return None, None
        half = STUDENT[min(count - 1, len(STUDENT)) - 1] * deviation / math.sqrt(count)
        return self.mean - half, self.mean + half

    @property
    def verdict(self) -> str:
        """Whether the claim holds, and whether the interval leaves it open."""
        return self.at_most(math.log(ABOUT_AS_LOW), ("holds", "fails"))

    def at_most(self, threshold: float, words: tuple[str, str]) -> str:
        """The first word if this is at most `threshold`, else the second; and whether the interval leaves it open."""
        word, (low, high) = words[self.mean > threshold], self.interval
        return f"{word}, uncertain" if low is not None and low <= threshold < high else word


def difference(kv: dict[int, float], other: dict[int, float]) -> Difference | None:
    """Of nats per token by seed, None if there is no seed that both have."""
    common = sorted(kv.keys() & other.keys())
    return Difference(tuple(kv[seed] - other[seed] for seed in common)) if common else None


class Between(NamedTuple):
    """Nats per token between two measured runs, whose mean numbers of kept keys are given too."""

    nll: float
    below: float
    above: float


def at_kept_keys(curve: Iterable[Point], kept: float, seeds: Container[int]) -> dict[int, Between]:
    """A method's nats per token at a mean number of kept keys, by those of the `seeds` whose runs reach around `kept`.

    Linear between the two measured neighbours. They should be neighbours on the grid: a seed with a wider gap there
    counts only if no seed has a narrower one.
    """
    by_seed: dict[int, list[tuple[float, float, float]]] = {}
    for point in curve:
        for seed, run in point.runs.items():
            if seed in seeds and (held := number(run.content.get("kept_keys_mean"))) is not None:
                by_seed.setdefault(seed, []).append((held, point.nlls[seed], point.ratio))
    found, gaps = {}, {}
    for seed, measured in by_seed.items():
        below = max((run for run in measured if run[0] <= kept), default=None)
        above = min((run for run in measured if run[0] >= kept), default=None)
        if below and above:
            share = (kept - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
            found[seed] = Between(below[1] + share * (above[1] - below[1]), below[0], above[0])
            gaps[seed] = round(abs(above[2] - below[2]), 6)
    widest = max(STEP, min(gaps.values(), default=STEP))
    return {seed: between for seed, between in found.items() if gaps[seed] <= widest}


@dataclass(frozen=True)
class Sinks:
    """Sink attention at as many kept keys on average as a point of KV compression."""

    variant: str
    between: dict[int, Between]
    difference: Difference  # of the point to it


def sinks_beside(found: Sequence[Point], point: Point) -> dict[str, Sinks]:
    """Sink attention with each number of sinks, by variant, as far as its runs reach around the point's kept keys."""
    kept = point.mean("kept_keys_mean")
    curves: dict[str, list[Point]] = {}
    for other in found if point.method == KV and kept is not None else ():
        if other.method == SINK and other.fine_tuned == point.fine_tuned:
            curves.setdefault(other.variant, []).append(other)
    beside = {}
    for variant, curve in curves.items():
        between = at_kept_keys(curve, kept, point.nlls)
        against = difference(point.nlls, {seed: one.nll for seed, one in between.items()})
        if against:
            beside[variant] = Sinks(variant, between, against)
    return beside


def best_of(sinks: Iterable[Sinks]) -> Sinks | None:
    """Those that the point of KV compression compares worst with."""
    return max(sinks, key=lambda one: one.difference.mean, default=None)


def describe(group: Group, protocol: str) -> list[dict]:
    """A row a point: its means over seeds, and how it stands to full attention and to sinks of equal kept keys."""
    found, numbers = points(group, protocol), number_variants(group)
    rows = []
    for point in found:
        alike = "" if point.fine_tuned else UNTUNED
        full = select(found, FULL, alike).get(0.0)
        above = difference(point.nlls, full.nlls) if full else None
        beside = sinks_beside(found, point)
        sinks, best = beside.get(alike), best_of(beside.values())
        untrained = [run.nll(protocol, "untrained") for run in point.runs.values()]
        never = select(found, point.method, ", ".join(filter(None, [point.variant, UNTUNED])))
        if not any(untrained) and point.ratio in never:
            untrained = never[point.ratio].nlls.values()
        rows.append(
            {
                "protocol": protocol,
                "number": numbers.get((protocol, point.variant, point.ratio)) if point.method == KV else None,
                "method": point.method,
                "variant": point.variant,
                "ratio": point.ratio,
                "fine_tuned": point.fine_tuned,
                "seeds": len(point.runs),
                "removed_fraction": point.mean("removed_fraction"),
                "attended_fraction": point.mean("attended_fraction"),
                "kept_keys_mean": point.mean("kept_keys_mean"),
                "kept_keys_max": max(point.recorded("kept_keys_max"), default=None),
                "perplexity": mean(point.perplexities),
                "perplexity_spread": spread(point.perplexities),
                "nats_above_full": above.mean if above else None,
                "untrained_perplexity": mean(perplexity(nll) for nll in untrained if nll is not None),
                **_interpolated("sink", point, sinks.between if sinks else {}),
                "difference_to_sink": sinks.difference.mean if sinks else None,
                "best_sink_variant": best.variant if best else None,
                **_interpolated("best_sink", point, best.between if best else {}),
                "difference_to_best_sink": best.difference.mean if best else None,
            }
        )
    return rows


def _interpolated(name: str, point: Point, between: dict[int, Between]) -> dict:
    """Columns on what was interpolated for the point's seeds: the perplexity and how far apart the neighbours are."""
    found = [between[seed] for seed in point.nlls if seed in between]
    return {
        f"{name}_perplexity": mean(perplexity(one.nll) for one in found),
        f"{name}_kept_below": min((one.below for one in found), default=None),
        f"{name}_kept_above": max((one.above for one in found), default=None),
    }


def judge_claim_1(group: Group, protocol: str) -> list[dict]:
    """KV compression against every baseline at every ratio that both have, a row each."""
    found = points(group, protocol)
    rows = []
    for baseline in BASELINES:
        others = select(found, baseline)
        for ratio, point in select(found, KV).items():
            if ratio in others:
                removed = {"kv_removed": point.mean("removed_fraction")}
                removed["baseline_removed"] = others[ratio].mean("removed_fraction")
                rows += _judge(PROTOCOLS[protocol], baseline, point, others[ratio].nlls, removed)
    return rows


def judge_kept_keys(group: Group, protocol: str) -> list[dict]:
    """KV compression against every baseline, interpolated to as many kept keys on average."""
    found = points(group, protocol)
    rows = []
    for baseline in BASELINES:
        curve = select(found, baseline).values()
        for point in select(found, KV).values():
            if (kept := point.mean("kept_keys_mean")) is not None:
                between = at_kept_keys(curve, kept, point.nlls)
                nlls = {seed: one.nll for seed, one in between.items()}
                columns = {"kept_keys": kept} | _interpolated("baseline", point, between)
                rows += _judge(f"equal kept keys, {protocol}", baseline, point, nlls, columns)
    return rows


def _judge(comparison: str, baseline: str, kv: Point, others: dict[int, float], columns: dict) -> list[dict]:
    """The row of one comparison, with more `columns`; none if no seed is common."""
    measured = difference(kv.nlls, others)
    if measured is None:
        return []
    common = [seed for seed in kv.nlls if seed in others]
    low, high = measured.interval
    return [
        {
            "comparison": comparison,
            "baseline": baseline,
            "ratio": kv.ratio,
            "seeds": len(common),
            "kv_perplexity": mean(perplexity(kv.nlls[seed]) for seed in common),
            "baseline_perplexity": mean(perplexity(others[seed]) for seed in common),
            "difference": measured.mean,
            "spread": spread(measured.values),
            "low": low,
            "high": high,
            "times": perplexity(measured.mean),
            "verdict": measured.verdict,
        }
        | columns
    ]


def beyond(group: Group) -> list[dict]:
    """What the variants of KV compression come to in the protocol matched, a row a question.

    At every ratio with variants two are asked about, if they are two: the one of lowest perplexity, and the one that
    compares best with the best sink attention at equal kept keys. The questions: "gap", nats above full attention ÷ the
    plain method's; "sink" and "best_sink", perplexity ÷ sink attention's at equal kept keys, with 4 sinks and with as
    many as are best; "full", perplexity ÷ full attention's. What was not measured has no figures.
    """
    found, numbers = points(group, "matched"), number_variants(group)
    rows = []
    for ratio in sorted({point.ratio for point in variants(found)}):
        own = [point for point in variants(found) if point.ratio == ratio]
        beside = {point.variant: sinks_beside(found, point) for point in own}
        chosen = {"lowest perplexity": min(own, key=lambda point: mean(point.nlls.values()))}
        compared = [point for point in own if beside[point.variant]]
        if compared:
            best = min(compared, key=lambda point: best_of(beside[point.variant].values()).difference.mean)
            if best not in chosen.values():
                chosen["best against sink attention"] = best
        for choice, point in chosen.items():
            about = {"ratio": ratio, "variants": len(own), "choice": choice, "variant": point.variant}
            about |= {"number": numbers["matched", point.variant, ratio], "perplexity": mean(point.perplexities)}
            about |= {"kept_keys": point.mean("kept_keys_mean"), "removed": point.mean("removed_fraction")}
            for question, answer in _answers(found, point, beside[point.variant]).items():
                rows.append(about | {"question": question, "aim": AIMS.get(ratio, {}).get(question)} | answer)
    return rows


def _answers(found: Sequence[Point], point: Point, beside: dict[str, Sinks]) -> dict[str, dict]:
    """The figures on each question of `beyond`."""
    aims = AIMS.get(point.ratio, {})
    full, plain = select(found, FULL).get(0.0), select(found, KV).get(point.ratio)
    answers = {"gap": _gap(point, plain, full, aims.get("gap"))}
    for question, sinks in (("sink", beside.get("")), ("best_sink", best_of(beside.values()))):
        answer = _share(sinks and sinks.difference, aims.get(question))
        answers[question] = answer | _interpolated("other", point, sinks.between if sinks else {})
        answers[question]["other"] = sinks.variant if sinks else None
    answer = _share(difference(point.nlls, full.nlls) if full else None, aims.get("full"))
    common = [perplexity(nll) for seed, nll in full.nlls.items() if seed in point.nlls] if full else []
    answers["full"] = answer | {"other_perplexity": mean(common)}
    return answers


MET = ("met", "not met")


def _share(measured: Difference | None, aim: float | None) -> dict:
    """Perplexity as a share of another's, and whether it is as small as is aimed at."""
    if measured is None:
        return {"value": None, "verdict": "not measured"}
    return {"value": perplexity(measured.mean), "verdict": measured.at_most(math.log(aim), MET) if aim else "no aim"}


def _gap(point: Point, plain: Point | None, full: Point | None, aim: float | None) -> dict:
    """Nats above full attention as a share of the plain method's, over the seeds that all three have."""
    seeds = [seed for seed in point.nlls if plain and full and seed in plain.nlls and seed in full.nlls]
    if not seeds:
        return {"value": None, "verdict": "not measured"}
    own, theirs = ([which.nlls[seed] - full.nlls[seed] for seed in seeds] for which in (point, plain))
    answer = {"nats": statistics.fmean(own), "plain_nats": statistics.fmean(theirs)}
    answer["value"] = answer["nats"] / answer["plain_nats"] if answer["plain_nats"] > 0 else None
    left = Difference(tuple(one - (aim or 0) * other for one, other in zip(own, theirs)))
    return answer | {"verdict": left.at_most(0, MET) if aim else "no aim"}


def judge_claim_2(scores: Sequence[Score], protocol: str) -> list[dict]:
    """KV compression's continuations against every baseline's, document by document, a row a metric and ratio."""
    from kv_compression.generation.comparing import FEWEST_DOCUMENTS, bootstrap, paired_p_value

    rows = []
    for baseline in BASELINES:
        for ratio in sorted({score.ratio for score in scores}):
            kv, other = (_of_protocol(scores, method, ratio, protocol) for method in (KV, baseline))
            seeds = [seed for seed in kv if seed in other]
            for metric in METRICS:
                ours, theirs = (_by_document([which[seed] for seed in seeds], metric) for which in (kv, other))
                common = [index for index in ours if index in theirs]
                if not common:
                    continue
                first, second = [ours[index] for index in common], [theirs[index] for index in common]
                estimate = bootstrap([one - two for one, two in zip(first, second)])
                p_value = paired_p_value(first, second)
                better = (estimate.mean < 0) == (metric == "perplexity")
                verdict = "no difference shown" if p_value >= SIGNIFICANT else "holds" if better else "reversed"
                verdict = TOO_FEW if len(common) < FEWEST_DOCUMENTS else verdict
                rows.append(
                    {
                        "comparison": PROTOCOLS[protocol],
                        "baseline": baseline,
                        "metric": metric,
                        "ratio": ratio,
                        "documents": len(common),
                        "kv": mean(first),
                        "baseline_mean": mean(second),
                        "difference": estimate.mean,
                        "low": estimate.low,
                        "high": estimate.high,
                        "p_value": p_value,
                        "verdict": verdict,
                    }
                )
    return rows


def _of_protocol(scores: Sequence[Score], method: str, ratio: float, protocol: str) -> dict[int | None, Score]:
    """The plain method's scores by seed; without sentinels those of any protocol, its own first."""
    found: dict[int | None, Score] = {}
    for score in sorted(scores, key=lambda score: (score.protocol != protocol, score.path)):
        fits = (score.method, score.ratio, score.variant) == (method, ratio, "")
        if fits and (score.protocol == protocol or not score.has_sentinels):
            found.setdefault(score.seed, score)
    return found


def _by_document(scores: Sequence[Score], metric: str) -> dict[str, float]:
    """One value a document: the mean over the files that scored it."""
    values: dict[str, list[float]] = {}
    for score in scores:
        for index, document in score.content["documents"].items():
            if (value := number(document.get(metric))) is not None:
                values.setdefault(index, []).append(value)
    return {index: statistics.fmean(several) for index, several in sorted(values.items())}


def missing(group: Group) -> list[str]:
    """What the grid of methods, ratios, seeds and protocols still lacks, a line for each method and seed."""
    have = {
        protocol: {(p.method, p.ratio, seed) for p in points(group, protocol) if not p.variant for seed in p.runs}
        for protocol in group.protocols
    }
    return _lacking(have, group.seeds)


def missing_scores(scores: Sequence[Score]) -> list[str]:
    """As `missing`, of continuations that were generated and scored."""
    seeds = sorted({score.seed for score in scores}, key=lambda seed: -1 if seed is None else seed)
    protocols = [name for name in PROTOCOLS if any(score.protocol == name for score in scores)]
    have = {
        protocol: {
            (method, ratio, seed)
            for method in METHODS
            for ratio in (0.0, *GRID)
            for seed in _of_protocol(scores, method, ratio, protocol)
        }
        for protocol in protocols
    }
    return _lacking(have, seeds)


def _lacking(have: dict[str, set[tuple]], seeds: Sequence[int | None]) -> list[str]:
    """What of the grid is not among the (method, ratio, seed) that each protocol has."""
    lines = []
    for method in METHODS:
        wanted = (0.0,) if method == FULL else GRID
        for seed in seeds:
            lacking: dict[str, list[str]] = {}
            for protocol, found in have.items():
                ratios = told(ratio for ratio in wanted if (method, ratio, seed) not in found)
                lacking.setdefault(ratios, []).append(protocol)
            lines += [
                f"{label(method)}, {' and '.join(protocols)}, seed {'-' if seed is None else seed}: {ratios}"
                for ratios, protocols in lacking.items()
                if ratios
            ]
    return lines


def told(ratios: Iterable[float]) -> str:
    """Ratios in a row, neighbours on the grid shortened: 0.1 – 0.4, 0.6."""
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
    for verdict in verdicts:
        those = [row for row in rows if row["verdict"].startswith(verdict)]
        open_ones = told(row["ratio"] for row in those if row["verdict"].endswith("uncertain"))
        if those:
            aside = f" (uncertain at {open_ones})" if open_ones else ""
            parts.append(f"{verdict} at {told(row['ratio'] for row in those)}{aside}")
    ratios = {row["ratio"] for row in rows}
    rest = [ratio for ratio in GRID if ratio not in ratios]
    parts.append(f"{len(GRID) - len(rest)} of {len(GRID)} ratios {what}")
    return "; ".join(parts + [f"not {what}: {told(rest)}"] * bool(rest)) + "."
