"""The report on what was measured: report.md, CSV tables and plots.

Collecting is `measured`, comparing and judging `verdicts`, drawing `plots`; here it is told. No verdict is written by
hand.
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

from kv_compression.io import ownership
from kv_compression.io.errors import printable
from kv_compression.io.results import figure, write_text
from kv_compression.reporting import plotting, published
from kv_compression.reporting.collecting import (
    BASELINES,
    CLAIMED,
    FULL,
    GRID,
    KV,
    METHODS,
    METRICS,
    PROTOCOLS,
    Found,
    Group,
    Point,
    Run,
    Score,
    mean,
    number,
    number_variants,
    points,
    rank,
    select,
    variants,
)
from kv_compression.reporting.comparing import (
    ABOUT_AS_LOW,
    SIGNIFICANT,
    STEP,
    TOO_FEW,
    beyond,
    caveat,
    conclude,
    describe,
    judge_claim_1,
    judge_claim_2,
    judge_kept_keys,
    missing,
    missing_scores,
    told,
)
from kv_compression.reporting.plotting import label

OF_A_MEASUREMENT = (
    *("perplexity", "nll", "nll_per_token", "nll_per_batch", "num_targets", "num_blocks", "removed_fraction"),
    *("attended_fraction", "kept_keys_mean", "kept_keys_max", "tokens_per_second", "wall_seconds"),
)


@dataclass
class Report:
    """The pages before they are written: lines of Markdown, CSV tables, and plots that wait to be drawn."""

    lines: list[str] = field(default_factory=list)
    tables: dict[str, list[dict]] = field(default_factory=dict)
    pictures: dict[str, plotting.Picture] = field(default_factory=dict)

    def say(self, *lines: str) -> None:
        self.lines += [*lines, ""]

    def show(self, columns: dict[str, Callable], rows: Iterable) -> None:
        """A table: what each column is called, and how a row is told there."""
        cells = [[cell(str(tell(row))) for tell in columns.values()] for row in rows]
        if cells:
            head = [list(columns), ["---"] * len(columns)]
            self.say(*("| " + " | ".join(line) + " |" for line in head + cells))

    def keep(self, table: str, rows: Iterable[dict], **which) -> None:
        self.tables.setdefault(table, []).extend(which | row for row in rows)

    def picture(self, name: str, words: str, picture: plotting.Picture) -> None:
        """A plot, unless it would show next to nothing."""
        if picture.worth_drawing:
            self.pictures[name] = picture
            self.say(f"![{words}]({name})")


def cell(text: str) -> str:
    """Text that may come from a file, so that it stays in its place: one line, no markup, no column of its own."""
    line = printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
    return line.replace("](", "]\\(")


def signed(value: float | None, digits: int = 3) -> str:
    """A number with its sign, "-" where there is none."""
    return "-" if value is None else f"{value:+.{digits}f}"


def interval(row: dict, digits: int = 3) -> str:
    """The row's 95% interval, or why there is none."""
    return "one seed" if row["low"] is None else f"[{row['low']:+.{digits}f}, {row['high']:+.{digits}f}]"


def interpolated(row: dict, name: str) -> str:
    """The row's perplexity of a method, marked and with its neighbours' kept keys where it lies between them."""
    value, below, above = (row.get(f"{name}_{part}") for part in ("perplexity", "kept_below", "kept_above"))
    return figure(value) if not value or below == above else f"≈ {value:.2f} ({below:.1f} – {above:.1f})"


def best_sinks(row: dict) -> str:
    """The row's perplexity of sink attention with as many sinks as are best, and how many these are."""
    aside = f", {sinks(row['best_sink_variant'])}" if row["best_sink_variant"] is not None else ""
    return interpolated(row, "best_sink") + aside


def sinks(variant: str) -> str:
    """A variant of sink attention in words; it has 4 sinks unless it is told otherwise."""
    return variant or "sinks 4"


def with_spread(row: dict) -> str:
    """The row's perplexity, of several seeds with the standard deviation."""
    deviation = row["perplexity_spread"]
    return figure(row["perplexity"]) + (f" ± {deviation:.2f}" if deviation is not None else "")


OF_A_POINT = {
    "method": lambda row: label(row["method"]),
    "variant": lambda row: row["variant"] or "plain",
    "ratio": lambda row: f"{row['ratio']:g}",
    "seeds": lambda row: row["seeds"],
    "removed": lambda row: figure(row["removed_fraction"], 3),
    "attended": lambda row: figure(row["attended_fraction"], 3),
    "kept keys, mean": lambda row: figure(row["kept_keys_mean"], 1),
    "kept keys, max": lambda row: figure(row["kept_keys_max"], 0),
    "perplexity": with_spread,
    "nats above full": lambda row: signed(row["nats_above_full"]),
}
OF_A_VARIANT = {
    "no.": lambda row: row["number"] or "-",
    **OF_A_POINT,
    "4 sinks, equal kept keys": lambda row: interpolated(row, "sink"),
    "best sinks, equal kept keys": best_sinks,
}
OF_A_COMPARISON = {
    "baseline": lambda row: label(row["baseline"]),
    "ratio": lambda row: f"{row['ratio']:g}",
    "seeds": lambda row: row["seeds"],
    "KV": lambda row: figure(row["kv_perplexity"]),
    "baseline's": lambda row: interpolated(row, "baseline"),
    "removed": lambda row: f"{figure(row['kv_removed'], 3)}, {figure(row['baseline_removed'], 3)}",
    "kept keys": lambda row: figure(row["kept_keys"], 1),
    "nats": lambda row: signed(row["difference"]),
    "± sd": lambda row: figure(row["spread"], 3),
    "95%": interval,
    "KV ÷ baseline": lambda row: figure(row["times"]),
    "verdict": lambda row: row["verdict"],
}


def write(found: Found, folder: Path) -> Path:
    """Write report.md, its tables and its plots to `folder`; returns the path of report.md, which is written last.

    UsageError, before anything is written, if one of these names is that of somebody else's file.
    """
    report = build(found)
    tables = [name for name, rows in report.tables.items() if rows]
    names = ["report.md", *tables, *report.pictures]
    ownership.check((folder / name for name in names), instead="name another folder with --output_dir")
    for name, rows in report.tables.items():
        if rows:
            text = io.StringIO()
            writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(chain(*rows))), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_text(folder / name, text.getvalue())
    for name, picture in report.pictures.items():
        plotting.draw(folder / name, picture)
    path = folder / "report.md"
    write_text(path, "\n".join(report.lines).rstrip("\n") + "\n")
    return path


def build(found: Found) -> Report:
    """The whole report, not yet written."""
    report = Report()
    report.say("# Report")
    report.say(
        f"Made by `report.py`: {found.summary()}. Paths are relative to the folder that was searched. Perplexity is "
        "that of the test split after fine-tuning; ± is the standard deviation and [ ] the 95% interval over seeds; a "
        "dash is what was not measured. Each plot is there as an SVG, too."
    )
    for count, group in enumerate(found.groups, start=1):
        _group_section(report, group, count)
    for count, scores in enumerate(found.scores, start=1):
        _scores_section(report, scores, count)
    if found.unreadable:
        report.say("## Unreadable files")
        report.say(*(f"- {cell(path)} {cell(why)}" for path, why in found.unreadable))
    if found.duplicates:
        report.say("## Duplicates")
        report.say("Another file before them has the same settings, but for the attention kernel, and the same seed:")
        report.say(*(f"- {cell(path)}: {cell(first)} is used" for path, first in found.duplicates))
    if found.unscored:
        report.say("## Continuations that are not scored yet")
        report.say(*(f"- {cell(path)}" for path in found.unscored))
    report.say("## Verdicts")
    for count, group in enumerate(found.groups, start=1):
        _verdict_1(report, group, count)
    for count, scores in enumerate(found.scores, start=1):
        group = scores[0].made[-1]
        _verdict_2(report, scores, count, "" if group is None else _caveat(found.groups[group]))
    if not found.scores:
        report.say("### Claim 2")
        report.say("No continuations were scored.")
    _beyond(report, found.groups)
    return report


def _caveat(group: Group) -> str:
    """What to add to a verdict on a group whose runs are a demonstration."""
    return caveat(run.content for run in group.runs if run.method == KV and not run.content.get("eval_only"))


def _group_section(report: Report, group: Group, count: int) -> None:
    report.say(f"## Claim 1, group {count}: {cell(group.model)} on {cell(group.text)}")
    settings = ", ".join(f"{name} {value}" for name, value in group.settings.items())
    report.say(f"Shared settings: {cell(settings)}.")
    texts = _test_texts(group)
    if len(texts) > 1:
        report.say(f"Not all of these runs scored the same text. The first run of each: {', '.join(texts)}.")
    if "paper" in group.protocols:
        report.say("### Against the ratio asked for, protocol paper")
        _nominal(report, group, count)
    for protocol in group.protocols:
        rows = describe(group, protocol)
        report.keep("report_means.csv", rows, group=count)
        report.say(f"### All runs, protocol {protocol}")
        columns = OF_A_POINT | {"untrained": lambda row: figure(row["untrained_perplexity"])}
        del columns["variant"]
        report.show(columns, (row for row in rows if not row["variant"]))
        varied = [row for row in rows if row["variant"] and row["fine_tuned"]]
        if varied:
            report.say(f"### Variants, protocol {protocol}")
            report.say(
                "They are on no curve of the plain method; plots have their numbers. Sink attention's perplexity is "
                "interpolated (≈) to the same mean number of kept keys: linearly, in its logarithm, between the "
                "measured runs whose kept keys stand in brackets, the further apart the more in favour of KV "
                "compression; with 4 sinks, and with the number of sinks, of those measured, that is best there."
            )
            plain = [row for row in rows if row["method"] == KV and not row["variant"]]
            report.show(OF_A_VARIANT, plain + varied)
        if not all(row["fine_tuned"] for row in rows):
            report.say(f"### Without fine-tuning, protocol {protocol}")
            report.show(OF_A_POINT, (row for row in rows if not row["fine_tuned"]))
    report.say("### Against what was measured")
    _measured(report, group, count)
    report.say("### Missing runs")
    report.say(*(f"- {line}" for line in missing(group) or ["none"]))
    report.keep("report_runs.csv", map(_run_row, group.runs), group=count)


def _test_texts(group: Group) -> list[str]:
    """The first run of each different test text, among plain runs whose blocks do not depend on spans."""
    first: dict[str, str] = {}
    for run in group.runs:
        hashes = run.content.get("blocks_sha256")
        if isinstance(hashes, dict) and not run.variant and (run.protocol == "matched" or not run.has_sentinels):
            first.setdefault(str(hashes.get("test")), cell(run.path))
    return list(first.values())


def _run_row(run: Run) -> dict:
    """One line of the table of runs, with all its digits."""
    row = {"path": printable(run.path), "method": run.method, "variant": run.variant, "ratio": run.ratio}
    row |= {"protocol": run.protocol, "seed": run.seed}
    row |= {name: number(run.content.get(name)) for name in OF_A_MEASUREMENT}
    return row | {"device": printable(str(run.content.get("device") or ""))}


def _nominal(report: Report, group: Group, count: int) -> None:
    """Our curves beside the published ones, absolute and as multiples of full attention's perplexity."""
    found = points(group, "paper")
    curves = {method: list(curve.values()) for method in METHODS if (curve := select(found, method))}
    same_model = published.MODEL in str(group.settings.get("model_name_or_path"))
    words = "Test perplexity against the ratio asked for, ours and published"
    picture = plotting.nominal(list(curves.values()), group.model, same_model)
    report.picture(f"report_{count}_nominal.png", words, picture)
    sources = "; ".join(f"{name}: {words}" for name, words in published.SOURCES.items())
    report.say(f"The published figures are {published.MODEL}'s on WikiText-2 ({sources}).")
    full = curves.pop(FULL, None)
    if full is None:
        report.say("Full attention was not measured, so there is no shape to compare with theirs.")
    else:
        if not same_model:
            report.say(
                "The heights are another model's, only the shapes compare: below, each perplexity is divided by the "
                "same source's of full attention."
            )
        below = mean(full[0].perplexities)
        words = "Perplexity as a multiple of full attention's, ours and published"
        report.picture(f"report_{count}_shape.png", words, plotting.shape(list(curves.values()), below))
        multiples = {}
        for method in (method for method in METHODS if method in curves or method in published.METHODS):
            ours = {point.ratio: mean(point.perplexities) / below for point in curves.get(method, ())}
            multiples[f"{label(method)}, ours"] = ours
            for source in published.SOURCES if method in published.METHODS else ():
                multiples[f"{label(method)}, {source}"] = published.above_full(source, method)
        _by_ratio(report, "ratio", multiples, 2)
    report.say("What the ratio asked for means: the share of cache entries that is gone at a block's end.")
    removed = {
        f"{label(method)} removes": {point.ratio: point.mean("removed_fraction") for point in curve}
        for method, curve in curves.items()
    }
    _by_ratio(report, "ratio asked for", removed, 3)


def _by_ratio(report: Report, head: str, columns: dict[str, dict[float, float]], digits: int) -> None:
    """A table with a line a ratio above 0 that any column has."""
    tell = {name: lambda ratio, column=column: figure(column.get(ratio), digits) for name, column in columns.items()}
    ratios = sorted(set(chain(*columns.values())) - {0.0})
    report.show({head: lambda ratio: f"{ratio:g}"} | tell, ratios)


def _measured(report: Report, group: Group, count: int) -> None:
    """Perplexity against the removed and the attended share and against kept keys, all token-weighted."""
    found = points(group, "matched") + [point for point in points(group, "paper", "matched") if point.foreign]
    curves: dict[str, list[Point]] = {}
    for point in found:
        if point.fine_tuned and not (point.method == KV and point.variant):
            curves.setdefault(point.name, []).append(point)
    plain = [curve for curve in curves.values() if not curve[0].variant]
    report.say(
        "Perplexity is token-weighted here, whatever the protocol. KV compression under the protocol paper is scored "
        "on other tokens than the rest."
    )
    words = "Test perplexity against the removed and the attended share"
    report.picture(f"report_{count}_measured.png", words, plotting.measured(plain))
    if any(point.recorded("kept_keys_mean") for point in found if point.method != FULL):
        numbers = number_variants(group)
        numbered = [(point, numbers[point.first.protocol, point.variant, point.ratio]) for point in variants(found)]
        words = "Test perplexity against the number of kept keys"
        report.picture(f"report_{count}_kept_keys.png", words, plotting.kept_keys(list(curves.values()), numbered))
    else:
        report.say("No run recorded its kept keys.")


FOLDS = {
    None: "No KV compression among them.",
    False: "KV compression kept whole what it generated. Baselines that drop keys go on dropping by their rule, and so "
    "hold fewer keys while they generate.",
    True: "KV compression folded what it generated, too (--compress_generated), as baselines that drop keys do.",
}


def _scores_section(report: Report, scores: Sequence[Score], count: int) -> None:
    report.say(f"## Claim 2, set {count} of continuations")
    documents, preset, encoder, language_model = (cell(str(part)) for part in scores[0].made[:4])
    convention = scores[0].content.get("convention") or "texts with the space before them, words of a to z alone"
    report.say(
        f"Documents {documents[:12]}, preset {preset}; BERTScore by {encoder}, perplexity by {language_model}; "
        f"{cell(str(convention))}. Means over documents with 95% bootstrap intervals. Cache: keys held when the prefix "
        "has been read ÷ its tokens."
    )
    report.say(FOLDS[next((way for score in scores if (way := score.compress_generated) is not None), None)])
    ordered = sorted(scores, key=lambda s: (rank(s.method), s.variant, s.protocol, s.ratio, s.seed or 0))
    drawn = [score for score in ordered if score.method == KV or not score.variant]
    words = "ROUGE-L, BERTScore and perplexity of continuations against the ratio asked for"
    report.picture(f"report_scores_{count}.png", words, plotting.scores(drawn))
    columns = {
        "method": lambda score: label(score.method),
        "variant": lambda score: score.variant or "plain",
        "ratio": lambda score: f"{score.ratio:g}",
        "protocol": lambda score: score.protocol,
        "seed": lambda score: "-" if score.seed is None else score.seed,
        "documents": lambda score: len(score.content["documents"]),
        "cache": lambda score: figure(number(score.content.get("cache_fraction")), 3),
    }
    for metric, name in METRICS.items():
        digits = 1 if metric == "perplexity" else 4
        columns[name] = lambda score, metric=metric, digits=digits: _estimate(score.content[metric], digits)
    report.show(columns, ordered)
    report.say("### Missing continuations")
    report.say(*(f"- {line}" for line in missing_scores(scores) or ["none"]))
    report.keep("report_scores.csv", map(_score_row, ordered), set=count)


def _estimate(estimate: dict, digits: int) -> str:
    middle, low, high = (number(estimate.get(name)) for name in ("mean", "low", "high"))
    return figure(middle, digits) + (f" [{low:.{digits}f}, {high:.{digits}f}]" if None not in (low, high) else "")


def _score_row(score: Score) -> dict:
    """One line of the table of scores, with all its digits."""
    row = {"path": printable(score.path), "method": score.method, "variant": score.variant, "ratio": score.ratio}
    row |= {"protocol": score.protocol, "seed": score.seed, "documents": len(score.content["documents"])}
    row["cache_fraction"] = number(score.content.get("cache_fraction"))
    for metric in METRICS:
        row[metric] = score.content[metric]["mean"]
        row |= {f"{metric}_{end}": score.content[metric][end] for end in ("low", "high")}
    return row


def _verdict_1(report: Report, group: Group, count: int) -> None:
    report.say(f"### Claim 1, group {count}: {cell(group.model)} on {cell(group.text)}")
    report.say(
        f"KV compression's test perplexity is about as low as a baseline's, or lower. “Holds” means at most "
        f"{ABOUT_AS_LOW:g} times the baseline's. Differences are KV compression's nats per token less the baseline's, "
        "seed by seed; where the 95% interval reaches across the threshold the verdict is called uncertain. “Removed” "
        "is the share of cache entries gone at a block's end, KV compression's and the baseline's."
    )
    aside = _caveat(group)
    for protocol, name in PROTOCOLS.items():
        what = "at equal ratios asked for" if protocol == "paper" else "at an equal share removed"
        report.say(f"**{name.capitalize()}**, {what} (protocol {protocol}):")
        rows = judge_claim_1(group, protocol)
        report.say(*_conclusions_1(rows, "measured", aside, published_too=protocol == "paper"))
        report.show({name: tell for name, tell in OF_A_COMPARISON.items() if name != "kept keys"}, rows)
        report.keep("report_claim_1.csv", rows, group=count)
    for protocol in group.protocols:
        rows = judge_kept_keys(group, protocol)
        report.keep("report_claim_1.csv", rows, group=count)
        if rows:
            report.say(
                f"**At an equal mean number of kept keys** (protocol {protocol}), the baseline interpolated (≈) "
                "between the measured runs whose kept keys stand in brackets; a seed whose runs lie further apart "
                f"there than a step of {STEP} is left out if another's do not. The curve bends: a straight line "
                "between distant neighbours mostly lies above it, in favour of KV compression."
            )
            report.say(*_conclusions_1(rows, "compared", aside))
            report.show({name: tell for name, tell in OF_A_COMPARISON.items() if name != "removed"}, rows)
        _variants_verdict(report, group, protocol)


def _conclusions_1(rows: Sequence[dict], what: str, aside: str, published_too: bool = False) -> list[str]:
    """A line a baseline, and one for the two that the claim names; `aside` ends each that has a verdict."""
    lines, holds, known = [], [], []
    for baseline in BASELINES:
        own = [row for row in rows if row["baseline"] == baseline]
        line = f"- against {label(baseline)}{'' if baseline in CLAIMED else ' (not part of the claim)'}: "
        line += conclude(own, ("holds", "fails"), what)
        if own:
            times = sorted({figure(row["times"]) for row in (min(own, key=_times), max(own, key=_times))}, key=float)
            line += f" Its perplexity is {' – '.join(times)} times the baseline's."
            line += " One seed: no spread over seeds." if all(row["seeds"] == 1 for row in own) else ""
            line += f" {aside}" * bool(aside)
        if published_too and baseline in CLAIMED:
            held = [f"{told(_published_holds(name, baseline)) or 'none'} ({name})" for name in published.SOURCES]
            line += f" By the same measure the published figures hold at {'; '.join(held)}."
        if baseline in CLAIMED:
            known.append({row["ratio"] for row in own})
            holds.append({row["ratio"] for row in own if row["verdict"].startswith("holds")})
        lines.append(line)
    both = f"holds at {told(set.intersection(*holds)) or 'none'}; {what} at {told(set.intersection(*known)) or 'none'}."
    return [*lines, f"- against both local and scattered attention: {both}"]


def _times(row: dict) -> float:
    return row["times"]


def _published_holds(source: str, baseline: str) -> list[float]:
    ours, theirs = published.perplexities(source, KV), published.perplexities(source, baseline)
    return [ratio for ratio in GRID if ours[ratio] <= ABOUT_AS_LOW * theirs[ratio]]


def _variants_verdict(report: Report, group: Group, protocol: str) -> None:
    rows = [row for row in describe(group, protocol) if row["number"]]
    lines = []
    for name, words in (("sink", "with 4 sinks"), ("best_sink", "with as many sinks as are best there")):
        compared = sorted(
            (row for row in rows if row[f"difference_to_{name}"] is not None), key=itemgetter(f"difference_to_{name}")
        )
        ahead = [row for row in compared if row[f"difference_to_{name}"] <= 0]
        named = [f"no. {row['number']} at {row['ratio']:g} ({row[f'difference_to_{name}']:+.3f} nats)" for row in ahead]
        lines.append(
            f"- {words}: {len(ahead)} of {len(compared)} that could be compared, of {len(rows)} measured"
            f"{': ' * bool(named)}{', '.join(named)}."
        )
    if rows:
        report.say(
            f"**Variants** (protocol {protocol}, numbers as in their table) with at most sink attention's perplexity "
            "at an equal mean number of kept keys:"
        )
        report.say(*lines)


def _verdict_2(report: Report, scores: Sequence[Score], count: int, aside: str) -> None:
    report.say(f"### Claim 2, set {count} of continuations")
    report.say(
        "With KV compression continuations are closer to the real text (ROUGE-L, BERTScore) and more fluent "
        "(perplexity) than with local attention. Differences are KV compression's scores less the baseline's, document "
        "by document, with 95% bootstrap intervals; p is a paired permutation test's, not corrected for the number of "
        f"comparisons. “Holds” means better with p < {SIGNIFICANT:g}, “reversed” worse with p < {SIGNIFICANT:g}, "
        f"“{TOO_FEW}” that no p could be so small."
    )

    def digits(row: dict) -> int:
        return 1 if row["metric"] == "perplexity" else 4

    columns = {
        "baseline": lambda row: label(row["baseline"]),
        "metric": lambda row: METRICS[row["metric"]],
        "ratio": lambda row: f"{row['ratio']:g}",
        "documents": lambda row: row["documents"],
        "KV": lambda row: figure(row["kv"], digits(row)),
        "baseline's": lambda row: figure(row["baseline_mean"], digits(row)),
        "difference": lambda row: signed(row["difference"], digits(row)),
        "95%": lambda row: interval(row, digits(row)),
        "p": lambda row: figure(row["p_value"], 4),
        "verdict": lambda row: row["verdict"],
    }
    for protocol, name in PROTOCOLS.items():
        rows = judge_claim_2(scores, protocol)
        report.keep("report_claim_2.csv", rows, set=count)
        report.say(f"**{name.capitalize()}** (protocol {protocol}), against local attention:")
        lines = []
        for metric, words in METRICS.items():
            own = [row for row in rows if (row["metric"], row["baseline"]) == (metric, CLAIMED[0])]
            line = f"- {words}: {conclude(own, ('holds', 'no difference shown', 'reversed', TOO_FEW))}"
            if own:
                least, most = (signed(pick(row["difference"] for row in own), digits(own[0])) for pick in (min, max))
                line += f" Differences are {least} … {most}." if len(own) > 1 else f" The difference is {least}."
                line += f" {aside}" * bool(aside)
            lines.append(line)
        report.say(*lines)
        report.show(columns, rows)


def _beyond(report: Report, groups: Sequence[Group]) -> None:
    report.say("## Beyond the paper")
    report.say(
        "What the variants of KV compression come to in the protocol matched, at each share truly removed where some "
        "were run: the one of lowest perplexity and, if that is another, the one that compares best with the best sink "
        "attention at an equal mean number of kept keys (≈ between the measured runs whose kept keys stand in "
        "brackets). The aims are this project's. The best of many, picked on the text that it is scored on, looks a "
        "little better than it is."
    )
    for count, group in enumerate(groups, start=1):
        rows = beyond(group)
        report.keep("report_beyond.csv", rows, group=count)
        for (ratio, many), of_ratio in groupby(rows, itemgetter("ratio", "variants")):
            variety = f"{many} variant{'s' * (many != 1)}"
            report.say(f"### At {ratio:g} removed, group {count}: {variety} of {cell(group.model)} measured")
            if aside := _caveat(group):
                report.say(aside)
            for choice, own in groupby(of_ratio, itemgetter("choice")):
                report.say(*_told_beyond(choice, list(own)))
    if not report.tables.get("report_beyond.csv"):
        report.say("No variant was run.")


def _told_beyond(choice: str, rows: Sequence[dict]) -> list[str]:
    """A choice of variant, then a line a question."""
    first = rows[0]
    kept = f"at {figure(first['kept_keys'], 1)} kept keys"
    lines = [
        f"**{choice.capitalize()}**: no. {first['number']}, {cell(first['variant'])}; perplexity "
        f"{first['perplexity']:.2f}, {figure(first['removed'], 3)} removed, {kept[3:]} on average.",
        "",
    ]
    for row in rows:
        question, value, aim = row["question"], row["value"], row["aim"]
        subject = {
            "gap": "nats above full attention as a share of the plain method's",
            "sink": f"against sink attention with 4 sinks {kept}",
            "best_sink": f"against the best sink attention {kept}",
            "full": "against full attention",
        }[question]
        if row["verdict"] == "not measured":
            answer = "not measured"
        elif question == "gap":
            answer = f"{figure(value)} ({row['nats']:+.3f} of {row['plain_nats']:+.3f})"
        else:
            aside = f", {sinks(row['other'])}" if question == "best_sink" else ""
            answer = f"{value:.2f} times, {first['perplexity']:.2f} to {interpolated(row, 'other')}{aside}"
        wanted = f" Aim: at most {aim:.2f}." if aim else ""
        verdict = f" {row['verdict'].capitalize()}." if aim and row["verdict"] != "not measured" else ""
        lines.append(f"- {subject}: {answer}.{wanted}{verdict}")
    return lines
