"""The report on what was measured: report.md, CSV tables and plots. Every verdict is computed (`comparing`)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from kv_compression.io import ownership
from kv_compression.io.errors import printable
from kv_compression.io.results import write_text
from kv_compression.io.tables import Columns, csv_table, escaped, estimate, figure, figures, markdown_table
from kv_compression.reporting import comparing, drawing, plotting, published, remembering
from kv_compression.reporting.collecting import (
    BASELINES,
    CLAIMED,
    FULL,
    GRID,
    KV,
    METRIC_NAMES,
    NO_SEED,
    OF_A_MEASUREMENT,
    PROTOCOLS,
    Found,
    Group,
    ScoredSet,
    label,
    points,
)
from kv_compression.reporting.comparing import ABOUT_AS_LOW, SIGNIFICANT, STEP, TOO_FEW, ranges

OF_A_ROW = ("path", "method", "variant", "ratio", "protocol", "seed")
COLUMNS_OF_A_RUN = [*OF_A_ROW, *OF_A_MEASUREMENT, "device"]
OF_SCORES = [*OF_A_ROW, "documents", "cache_fraction"]
OF_SCORES += [name + end for name in METRIC_NAMES for end in ("", "_low", "_high")]
FOLDS = {
    None: "No KV compression among them.",
    False: "KV compression kept whole what it generated. Baselines that drop keys go on dropping by their rule, and so "
    "hold fewer keys while they generate.",
    True: "KV compression folded what it generated, too (--compress_generated), as baselines that drop keys do.",
}


@dataclass
class Report:
    """The report before it is written: lines of Markdown, CSV tables, and plots to draw."""

    lines: list[str] = field(default_factory=list)
    tables: dict[str, list[dict]] = field(default_factory=dict)
    pictures: dict[str, drawing.Picture] = field(default_factory=dict)

    def say(self, *lines: str) -> None:
        """A paragraph, a heading, a list or a table."""
        self.lines += [*lines, ""] if any(lines) else []

    def say_each(self, lines: Iterable[str]) -> None:
        """A list."""
        self.say(*(f"- {line}" for line in lines))

    def keep(self, table: str, rows: Iterable[dict], **which) -> None:
        """Rows of a CSV table."""
        self.tables.setdefault(table, []).extend(which | row for row in rows)

    def picture(self, name: str, words: str, picture: drawing.Picture) -> None:
        """A plot, unless it would show next to nothing."""
        if picture.worth_drawing:
            self.pictures[name] = picture
            self.say(f"![{words}]({name})")


def write(found: Found, folder: Path) -> Path:
    """Write report.md, its tables and its plots to `folder`; returns the path of report.md, which is written last.

    UsageError, before anything is written, if one of these names is that of somebody else's file.
    """
    report = build(found)
    tables = {name: rows for name, rows in report.tables.items() if rows}
    names = ["report.md", *tables, *report.pictures]
    ownership.check((folder / name for name in names), instead="name another folder with --output_dir")
    for name, rows in tables.items():
        write_text(folder / name, csv_table(rows))
    for name, picture in report.pictures.items():
        drawing.draw(folder / name, picture)
    write_text(folder / "report.md", "\n".join(report.lines).rstrip("\n") + "\n")
    return folder / "report.md"


def build(found: Found) -> Report:
    """The whole report, not yet written."""
    report = Report()
    report.say("# Report")
    report.say(
        f"Made by `report.py`: {found.tally()}. Paths are relative to the folder that was searched. Perplexity is "
        "that of the test split after fine-tuning; ± is the standard deviation and [ ] the 95% interval over seeds; a "
        "dash is what was not measured. An SVG of each plot lies beside it."
    )
    described = [{name: comparing.describe(group, name) for name in group.protocols} for group in found.groups]
    for count, group in enumerate(found.groups, start=1):
        _group_section(report, group, described[count - 1], count)
    for count, scores in enumerate(found.scores, start=1):
        _scores_section(report, scores, count)
    if found.recalls:
        remembering.add_section(report, found.recalls)
    if found.unreadable:
        report.say("## Unreadable files")
        report.say_each(f"{escaped(path)} {escaped(why)}" for path, why in found.unreadable)
    if found.duplicates:
        report.say("## Duplicates")
        report.say("Another file before them has the same settings, but for the attention kernel, and the same seed:")
        report.say_each(f"{escaped(path)}: {escaped(first)} is used" for path, first in found.duplicates)
    if found.unscored:
        report.say("## Continuations that are not scored yet")
        report.say_each(map(escaped, found.unscored))
    report.say("## Verdicts")
    for count, group in enumerate(found.groups, start=1):
        _verdict_1(report, group, described[count - 1], count)
    for count, scores in enumerate(found.scores, start=1):
        _verdict_2(report, scores, count, "" if scores.group is None else _caveat(found.groups[scores.group]))
    if not found.scores:
        report.say("### Claim 2")
        report.say("No continuations were scored.")
    return report


def _caveat(group: Group) -> str:
    """A sentence for verdicts on a group whose runs are a demonstration."""
    return comparing.caveat(group.runs[(group.runs.method == KV) & group.runs.fine_tuned])


def _title(group: Group, count: int) -> str:
    return f"Claim 1, group {count}: {escaped(group.model)} on {escaped(group.text)}"


def _signed(value: float, digits: int = 3) -> str:
    return figure(value, digits, "+")


def _between(row: dict, name: str) -> str:
    """A perplexity, marked and with its neighbours' kept keys where it is interpolated."""
    value, below, above = (row.get(f"{name}_{part}") for part in ("perplexity", "kept_below", "kept_above"))
    exact = below is None or not above > below
    return figure(value) if exact else f"≈ {figure(value)} ({figure(below, 1)} – {figure(above, 1)})"


def _best_sinks(row: dict) -> str:
    """Sink attention's perplexity with as many sinks as are best, and how many these are."""
    best = row["best_sink_variant"]
    return _between(row, "best_sink") + ("" if best is None else f", {best or 'sinks 4'}")


def _of_points(varied: bool = False, beside: bool = False, untrained: bool = False) -> Columns:
    """The columns of a table of points: `beside` sinks of equal kept keys, with the variants' numbers."""
    columns = {
        "no.": lambda row: figure(row["number"], 0),
        "method": lambda row: label(row["method"]),
        "variant": lambda row: row["variant"] or "plain",
        "ratio": lambda row: f"{row['ratio']:g}",
        "seeds": lambda row: row["seeds"],
        "removed": lambda row: figure(row["removed_fraction"], 3),
        "attended": lambda row: figure(row["attended_fraction"], 3),
        "kept keys, mean": lambda row: figure(row["kept_keys_mean"], 1),
        "kept keys, max": lambda row: figure(row["kept_keys_max"], 0),
        "perplexity": lambda row: (
            figure(row["perplexity"]) + (f" ± {figure(row['perplexity_spread'])}" if row["seeds"] > 1 else "")
        ),
        "nats above full": lambda row: _signed(row["nats_above_full"]),
        "4 sinks, equal kept keys": lambda row: _between(row, "sink"),
        "best sinks, equal kept keys": _best_sinks,
        "untrained": lambda row: figure(row["untrained_perplexity"]),
    }
    shown = {"no.": beside, "variant": varied, "untrained": untrained}
    shown |= dict.fromkeys(("4 sinks, equal kept keys", "best sinks, equal kept keys"), beside)
    return {name: show for name, show in columns.items() if shown.get(name, True)}


def _group_section(report: Report, group: Group, described: dict[str, list[dict]], count: int) -> None:
    report.say(f"## {_title(group, count)}")
    settings = ", ".join(f"{name} {value}" for name, value in group.settings.items())
    report.say(f"Shared settings: {escaped(settings)}.")
    comparable = group.runs[(group.runs.variant == "") & ((group.runs.protocol == "matched") | ~group.runs.sentinels)]
    texts = comparable.dropna(subset="test_text").drop_duplicates("test_text").path.map(escaped)
    if len(texts) > 1:
        report.say(f"Not all of these runs scored the same text. The first run of each: {', '.join(texts)}.")
    if "paper" in group.protocols:
        report.say("### Against the ratio asked for, protocol paper")
        _nominal(report, group, count)
    for protocol, rows in described.items():
        _points_tables(report, rows, protocol, count)
    report.say("### Against what was measured")
    _measured(report, group, count)
    report.say("### Missing runs")
    report.say_each(comparing.missing(group.runs) or ["none"])
    rows = group.runs[COLUMNS_OF_A_RUN].assign(path=group.runs.path.map(printable))
    report.keep("report_runs.csv", rows.to_dict("records"), group=count)


def _points_tables(report: Report, rows: list[dict], protocol: str, count: int) -> None:
    """One table for the plain methods, one for their variants, and one for what was not fine-tuned."""
    report.keep("report_means.csv", rows, group=count)
    report.say(f"### All runs, protocol {protocol}")
    report.say(markdown_table(_of_points(untrained=True), (row for row in rows if not row["variant"])))
    varied = [row for row in rows if row["variant"] and row["fine_tuned"]]
    if varied:
        report.say(f"### Variants, protocol {protocol}")
        report.say(
            "They are on no curve of the plain method; plots have their numbers. Sink attention's perplexity is "
            "interpolated (≈) to the same mean number of kept keys: linearly, in its logarithm, between the measured "
            "runs whose kept keys stand in brackets, the further apart the more in favour of KV compression; with 4 "
            "sinks, and with the number of sinks, of those measured, that is best there."
        )
        plain = [row for row in rows if row["method"] == KV and not row["variant"]]
        report.say(markdown_table(_of_points(varied=True, beside=True), plain + varied))
    untuned = [row for row in rows if not row["fine_tuned"]]
    if untuned:
        report.say(f"### Without fine-tuning, protocol {protocol}")
        report.say(markdown_table(_of_points(varied=True), untuned))


def _nominal(report: Report, group: Group, count: int) -> None:
    """Our curves beside the published ones, absolute and as multiples of full attention's perplexity."""
    rows = comparing.average(points(group, "paper"))
    rows = rows[rows.variant == ""]
    same_model = published.MODEL in str(group.settings.get("model_name_or_path"))
    words = "Test perplexity against the ratio asked for, ours and published"
    report.picture(f"report_{count}_nominal.png", words, plotting.nominal(rows, group.model, same_model))
    sources = "; ".join(f"{name}: {words}" for name, words in published.SOURCES.items())
    report.say(f"The published figures are {published.MODEL}'s on WikiText-2 ({sources}).")
    full, rows = rows[rows.method == FULL].perplexity, rows[rows.method != FULL]
    if full.empty:
        report.say("Full attention was not measured, so there is no shape to compare with theirs.")
    else:
        if not same_model:
            report.say(
                "The heights are another model's, only the shapes compare: below, each perplexity is divided by the "
                "same source's of full attention."
            )
        words = "Perplexity as a multiple of full attention's, ours and published"
        report.picture(f"report_{count}_shape.png", words, plotting.shape(rows, full.iloc[0]))
        multiples = {}
        for method in sorted({*rows.method, *published.METHODS}):
            own = rows[rows.method == method].set_index("ratio")
            multiples[f"{label(method)}, ours"] = own.perplexity / full.iloc[0]
            for source in published.SOURCES if method in published.METHODS else ():
                multiples[f"{label(method)}, {source}"] = pd.Series(published.above_full(source, method))
        _by_ratio(report, "ratio", multiples, 2)
    report.say("What the ratio asked for means: the share of cache entries that is gone at a block's end.")
    removed = {
        f"{label(method)} removes": own.set_index("ratio").removed_fraction for method, own in rows.groupby("method")
    }
    _by_ratio(report, "ratio asked for", removed, 3)


def _by_ratio(report: Report, head: str, columns: dict[str, pd.Series], digits: int) -> None:
    """A table with one line for each ratio above 0 that any column has."""
    table = pd.DataFrame(columns).sort_index()
    shown = {head: lambda row: f"{row[0]:g}"}
    shown |= {name: lambda row, name=name: figure(row[1][name], digits) for name in table}
    report.say(markdown_table(shown, ((ratio, row) for ratio, row in table.iterrows() if ratio)))


def _measured(report: Report, group: Group, count: int) -> None:
    """Perplexity against the removed and the attended share and against kept keys, all token-weighted."""
    other = points(group, "paper", "matched")
    rows = pd.concat(map(comparing.average, (points(group, "matched"), other[other.foreign])), ignore_index=True)
    rows = rows[rows.fine_tuned.astype(bool)]
    report.say(
        "Perplexity is token-weighted here, whatever the protocol. KV compression under the protocol paper is scored "
        "on other tokens than the rest."
    )
    words = "Test perplexity against the removed and the attended share"
    report.picture(f"report_{count}_measured.png", words, plotting.measured(rows[rows.variant == ""]))
    if rows[rows.method != FULL].kept_keys_mean.notna().any():
        words = "Test perplexity against the number of kept keys"
        report.picture(f"report_{count}_kept_keys.png", words, plotting.kept_keys(rows))
    else:
        report.say("No run recorded its kept keys.")


def _scores_section(report: Report, scores: ScoredSet, count: int) -> None:
    report.say(f"## Claim 2, set {count} of continuations")
    made = {name: escaped(str(value)) for name, value in scores.made.items()}
    convention = scores.made["convention"] or "texts with the space before them, words of a to z alone"
    report.say(
        f"Documents {made['documents'][:12]}, preset {made['preset']}; BERTScore by {made['bertscore_model']}, "
        f"perplexity by {made['fluency_model']}; {escaped(str(convention))}. Means over documents with 95% bootstrap "
        "intervals. Cache: keys held when the prefix has been read ÷ its tokens."
    )
    report.say(FOLDS[scores.made["folds"]])
    rows = scores.rows.sort_values(["method", "variant", "protocol", "ratio", "seed"])
    words = "ROUGE-L, BERTScore and perplexity of continuations against the ratio asked for"
    drawn = plotting.scores(rows[(rows.method == KV) | (rows.variant == "")])
    report.picture(f"report_scores_{count}.png", words, drawn)
    columns = {
        "method": lambda row: label(row["method"]),
        "variant": lambda row: row["variant"] or "plain",
        "ratio": lambda row: f"{row['ratio']:g}",
        "protocol": lambda row: row["protocol"],
        "seed": lambda row: "-" if row["seed"] == NO_SEED else row["seed"],
        "documents": lambda row: row["documents"],
        "cache": lambda row: figure(row["cache_fraction"], 3),
    }
    for metric, name in METRIC_NAMES.items():
        columns[name] = lambda row, metric=metric: estimate(
            *(row[metric + end] for end in ("", "_low", "_high")), _digits(metric)
        )
    report.say(markdown_table(columns, rows.to_dict("records")))
    report.say("### Missing continuations")
    report.say_each(comparing.missing(scores.rows) or ["none"])
    rows = rows[OF_SCORES].assign(path=rows.path.map(printable), seed=rows.seed.where(rows.seed != NO_SEED))
    report.keep("report_scores.csv", rows.to_dict("records"), set=count)


def _digits(metric: str) -> int:
    return 1 if metric == "perplexity" else 4


OF_A_COMPARISON: Columns = {
    "baseline": lambda row: label(row["baseline"]),
    "ratio": lambda row: f"{row['ratio']:g}",
    "seeds": lambda row: row["seeds"],
    "KV": lambda row: figure(row["kv_perplexity"]),
    "baseline's": lambda row: _between(row, "baseline"),
    "removed": lambda row: f"{figure(row['kv_removed'], 3)}, {figure(row['baseline_removed'], 3)}",
    "kept keys": lambda row: figure(row["kept_keys"], 1),
    "nats": lambda row: _signed(row["difference"]),
    "± sd": lambda row: figure(row["spread"], 3),
    "95%": lambda row: "one seed" if row["seeds"] == 1 else figures((row["low"], row["high"]), 3, "+"),
    "KV ÷ baseline": lambda row: figure(row["times"]),
    "verdict": lambda row: row["verdict"],
}


def _verdict_1(report: Report, group: Group, described: dict[str, list[dict]], count: int) -> None:
    report.say(f"### {_title(group, count)}")
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
        rows = comparing.judge_claim_1(group, protocol)
        report.say(*_conclusions_1(rows, "measured", aside, published_too=protocol == "paper"))
        columns = {name: show for name, show in OF_A_COMPARISON.items() if name != "kept keys"}
        report.say(markdown_table(columns, rows))
        report.keep("report_claim_1.csv", rows, group=count)
    for protocol, points_described in described.items():
        rows = comparing.judge_kept_keys(group, protocol)
        report.keep("report_claim_1.csv", rows, group=count)
        if rows:
            report.say(
                f"**At an equal mean number of kept keys** (protocol {protocol}), the baseline interpolated (≈) "
                "between the measured runs whose kept keys stand in brackets; a seed whose runs lie further apart "
                f"there than a step of {STEP} is left out if another's do not. The curve bends: a straight line "
                "between distant neighbours mostly lies above it, in favour of KV compression."
            )
            report.say(*_conclusions_1(rows, "compared", aside))
            columns = {name: show for name, show in OF_A_COMPARISON.items() if name != "removed"}
            report.say(markdown_table(columns, rows))
        _variants_verdict(report, points_described, protocol)


def _conclusions_1(rows: Sequence[dict], what: str, aside: str, published_too: bool = False) -> list[str]:
    """One line per baseline, and one for the two that the claim names; lines with a verdict end with `aside`."""
    lines, holds, known = [], [], []
    for baseline in BASELINES:
        own = [row for row in rows if row["baseline"] == baseline]
        line = f"- against {label(baseline)}{'' if baseline in CLAIMED else ' (not part of the claim)'}: "
        line += comparing.conclude(own, ("holds", "fails"), what)
        if own:
            times = sorted({figure(pick(row["times"] for row in own)) for pick in (min, max)}, key=float)
            line += f" Its perplexity is {' – '.join(times)} times the baseline's."
            line += " One seed: no spread over seeds." if all(row["seeds"] == 1 for row in own) else ""
            line += f" {aside}" * bool(aside)
        if published_too and baseline in CLAIMED:
            held = [f"{ranges(_published_holds(name, baseline)) or 'none'} ({name})" for name in published.SOURCES]
            line += f" By the same measure the published figures hold at {'; '.join(held)}."
        if baseline in CLAIMED:
            known.append({row["ratio"] for row in own})
            holds.append({row["ratio"] for row in own if row["verdict"].startswith("holds")})
        lines.append(line)
    held, compared = (ranges(set.intersection(*ratios)) or "none" for ratios in (holds, known))
    return [*lines, f"- against both local and scattered attention: holds at {held}; {what} at {compared}."]


def _published_holds(source: str, baseline: str) -> list[float]:
    ours, theirs = published.perplexities(source, KV), published.perplexities(source, baseline)
    return [ratio for ratio in GRID if ours[ratio] <= ABOUT_AS_LOW * theirs[ratio]]


def _variants_verdict(report: Report, described: list[dict], protocol: str) -> None:
    """How many variants are at least as good as sink attention at equal kept keys, and which."""
    rows = pd.DataFrame(described).dropna(subset="number")
    lines = []
    for name, words in (("sink", "with 4 sinks"), ("best_sink", "with as many sinks as are best there")):
        compared = rows.rename(columns={f"difference_to_{name}": "nats"}).dropna(subset="nats").sort_values("nats")
        ahead = compared[compared.nats <= 0].itertuples()
        named = [f"no. {row.number:.0f} at {row.ratio:g} ({row.nats:+.3f} nats)" for row in ahead]
        lines.append(
            f"{words}: {len(named)} of {len(compared)} that could be compared, of {len(rows)} measured"
            f"{': ' * bool(named)}{', '.join(named)}."
        )
    if len(rows):
        report.say(
            f"**Variants** (protocol {protocol}, numbers as in their table) with at most sink attention's perplexity "
            "at an equal mean number of kept keys:"
        )
        report.say_each(lines)


def _verdict_2(report: Report, scores: ScoredSet, count: int, aside: str) -> None:
    report.say(f"### Claim 2, set {count} of continuations")
    report.say(
        "With KV compression continuations are closer to the real text (ROUGE-L, BERTScore) and more fluent "
        "(perplexity) than with local attention. Differences are KV compression's scores less the baseline's, document "
        "by document, with 95% bootstrap intervals; p is a paired permutation test's, not corrected for the number of "
        f"comparisons. “Holds” means better with p < {SIGNIFICANT:g}, “reversed” worse with p < {SIGNIFICANT:g}, "
        f"“{TOO_FEW}” that no p could be so small."
    )
    columns = {
        "baseline": lambda row: label(row["baseline"]),
        "metric": lambda row: METRIC_NAMES[row["metric"]],
        "ratio": lambda row: f"{row['ratio']:g}",
        "documents": lambda row: row["documents"],
        "KV": lambda row: figure(row["kv"], _digits(row["metric"])),
        "baseline's": lambda row: figure(row["baseline_mean"], _digits(row["metric"])),
        "difference": lambda row: _signed(row["difference"], _digits(row["metric"])),
        "95%": lambda row: figures((row["low"], row["high"]), _digits(row["metric"]), "+"),
        "p": lambda row: figure(row["p_value"], 4),
        "verdict": lambda row: row["verdict"],
    }
    for protocol, name in PROTOCOLS.items():
        rows = comparing.judge_claim_2(scores.rows, protocol)
        report.keep("report_claim_2.csv", rows, set=count)
        report.say(f"**{name.capitalize()}** (protocol {protocol}), against local attention:")
        lines = []
        for metric, words in METRIC_NAMES.items():
            own = [row for row in rows if (row["metric"], row["baseline"]) == (metric, CLAIMED[0])]
            line = f"{words}: {comparing.conclude(own, ('holds', 'no difference shown', 'reversed', TOO_FEW))}"
            if own:
                ends = [_signed(pick(row["difference"] for row in own), _digits(metric)) for pick in (min, max)]
                line += f" Differences are {' … '.join(ends)}." if len(own) > 1 else f" The difference is {ends[0]}."
                line += f" {aside}" * bool(aside)
            lines.append(line)
        report.say_each(lines)
        report.say(markdown_table(columns, rows))
