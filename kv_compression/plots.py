"""The report's plots as PNG files: panels above one legend, in colours that colour-blind readers tell apart.

Draws points and scores as `report` has them, and the published figures; compares nothing.
"""

import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kv_compression import published
from kv_compression.results import write_bytes

DPI = 150
WIDTH, HEIGHT, LEGEND_ROW = 9.0, 3.8, 0.24  # inches, of the figure, of the panels and of a line of the legend

# The palette of Okabe and Ito. A marker of its own tells a method apart in print, too.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"
_METHODS = {
    "full_attention": (BLACK, "P"),
    "kv_compression": (VERMILLION, "o"),
    "local_attention": (BLUE, "s"),
    "scattered_attention": (GREEN, "^"),
    "sink_attention": (PURPLE, "D"),
}
_VARIANT_COLOURS = (ORANGE, BLACK, SKY, GREY)
_VARIANT_MARKERS = ("v", "X", "*", "p", "<", ">", "h", "d", "8")
PERPLEXITY, ASKED = "test perplexity (log scale)", "compression ratio asked for"
RATIOS = tuple(tenths / 10 for tenths in range(10))
SHARES = tuple(tenths / 10 for tenths in range(0, 11, 2))
BEYOND_ALL_PLOTS = 1e30
BREAK = (math.nan,) * 4  # a point that ends a line, the next one begins another


@dataclass(frozen=True)
class Curve:
    """Points `(x, y, lowest, highest)`, in order, and how they look; a level is one line across at the first y."""

    label: str
    points: Sequence[tuple[float, float, float, float]]
    colour: str = GREY
    marker: str = "o"
    line: str = "-"
    filled: bool = True
    muted: bool = False
    level: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    y_label: str
    curves: Sequence[Curve]
    title: str = ""
    x_label: str = ""
    x_ticks: Sequence[float] = ()
    log_x: bool = False
    log_y: bool = True


def nominal(curves: Sequence[Sequence], model: str, same_model: bool, path: Path) -> None:
    """Test perplexity against the ratio asked for, the published figures beside ours."""
    ours = [curve_of(curve, lambda point: point.ratio) for curve in curves]
    panels = [
        Panel(PERPLEXITY, ours, f"ours: {model[:40]}", ASKED, RATIOS),
        Panel(PERPLEXITY, _published(published.perplexities), "published: RedPajama-3B on WikiText-2", ASKED, RATIOS),
    ]
    draw(path, panels, _bars(ours), share_y=same_model)


def shape(curves: Sequence[Sequence], full: float, path: Path) -> None:
    """Perplexity as a multiple of the same source's of full attention, which is `full` for ours."""
    ours = [curve_of(curve, lambda point: point.ratio, full) for curve in curves]
    drawn = [*ours, *_published(published.above_full)]
    draw(path, [Panel("test perplexity ÷ full attention's\n(log scale)", drawn, "", ASKED, RATIOS)], _bars(ours))


def measured(curves: Sequence[Sequence], path: Path) -> None:
    """Test perplexity against the removed and against the attended share."""
    removed, attended = (
        [curve_of(curve, lambda point, name=name: point.mean(name)) for curve in curves]
        for name in ("removed_fraction", "attended_fraction")
    )
    panels = [
        Panel(PERPLEXITY, removed, "", "share of cache entries removed\nat a block's end", SHARES),
        Panel("", attended, "", "share of earlier keys attended to,\nmean over pairs of text tokens", SHARES),
    ]
    draw(path, panels, _bars(removed), share_y=True)


def kept_keys(curves: Sequence[Sequence], variants: Sequence[Sequence], path: Path) -> None:
    """Test perplexity against the mean number of kept keys; variants are hollow marks."""
    drawn = [curve_of(curve, lambda point: point.mean("kept_keys_mean")) for curve in [*curves, *variants]]
    for number in range(len(variants)):
        look = {
            "colour": _VARIANT_COLOURS[number % len(_VARIANT_COLOURS)],
            "marker": _VARIANT_MARKERS[number % len(_VARIANT_MARKERS)],
        }
        place = len(curves) + number
        drawn[place] = replace(drawn[place], **look, line=":", filled=False, level=False)
    words = "keys held while a token is read, a span still being read in full,\nmean over tokens (log scale)"
    draw(path, [Panel(PERPLEXITY, drawn, "", words, log_x=True)], _bars(drawn))


def scores(found: Sequence, path: Path) -> None:
    """Claim 2's three scores against the ratio asked for; seeds are points of their own."""
    panels = []
    for metric, words in (("rouge_l", "ROUGE-L F1"), ("bertscore", "BERTScore F1"), ("perplexity", "perplexity")):
        points: dict[tuple[str, bool], list[tuple]] = {}
        for score in found:
            values = [score.content[metric].get(name) for name in ("mean", "low", "high")]
            if all(isinstance(value, int | float) for value in values):
                hollow = score.has_sentinels and score.protocol == "paper"
                points.setdefault((score.method, hollow), []).append((score.ratio, *values))
        curves = []
        for place, ((method, hollow), these) in enumerate(points.items()):
            aside = 0.016 * (place - (len(points) - 1) / 2)  # else one method's bar would hide another's
            these = [(ratio + aside, *values) for ratio, *values in these]
            name = label(method) + ", protocol paper" * hollow
            curves.append(_of_method(method, name, these, "", filled=not hollow))
        log_y = metric == "perplexity"
        panels.append(Panel(words + " (log scale)" * log_y, curves, "", ASKED, RATIOS[1::2], log_y=log_y))
    draw(path, panels, "bars: 95% bootstrap interval over documents; methods at one ratio stand side by side")


def label(method: str) -> str:
    """A method's name for readers."""
    return method.replace("kv_", "KV ").replace("_", " ")


def curve_of(points: Iterable, x: Callable, unit: float = 1.0) -> Curve:
    """Points of one method: mean and range over seeds ÷ `unit`, the line broken where the grid was not measured."""
    drawn, last = [], None
    points = [point for point in points if x(point) is not None]
    for point in points:
        if last is not None and point.ratio - last > 0.1 + 1e-9:
            drawn.append(BREAK)
        seeds = [value / unit for value in point.perplexities]
        drawn.append((x(point), statistics.fmean(seeds), min(seeds), max(seeds)))
        last = point.ratio
    if not points:
        return Curve("", ())
    look = {"line": "--", "filled": False} if points[0].foreign else {}
    return _of_method(points[0].method, points[0].name, drawn, **look)


def _of_method(method: str, name: str, points: Sequence[tuple], line: str = "-", **changes) -> Curve:
    """A curve in the look that a method has in every plot."""
    colour, marker = _METHODS.get(method, (GREY, "o"))
    return Curve(name, points, colour, marker, line, level=method == published.FULL, **changes)


def _published(figures: Callable[[str, str], dict[float, float]]) -> list[Curve]:
    """The published curves, in their methods' colours, muted: the paper's dashed, the reproduction's dotted."""
    return [
        _of_method(method, f"{label(method)}, {source}", [(x, y, y, y) for x, y in by_ratio.items()], line, muted=True)
        for source, line in zip(published.SOURCES, ("--", ":"))
        for method in published.METHODS
        if (by_ratio := figures(source, method))
    ]


def _bars(curves: Iterable[Curve]) -> str:
    """What the bars are, where there are any."""
    several = any(low < high for curve in curves for _, _, low, high in curve.points)
    return "bars: lowest to highest seed" if several else ""


@matplotlib.rc_context({"text.parse_math": False})  # a "$" in a name is a dollar
def draw(path: Path, panels: Sequence[Panel], note: str = "", share_y: bool = False) -> None:
    """Write the panels, side by side above one legend, as a PNG. RunError if the disk refuses.

    `note` heads the legend. Equal labels in several panels are one entry.
    """
    labels = {curve.label for panel in panels for curve in panel.curves if curve.label}
    longest = max(map(len, labels), default=0)
    columns = 3 if longest < 40 else 2 if longest < 68 else 1
    rows = -(-len(labels) // columns) + bool(note)
    figure = Figure(figsize=(WIDTH, HEIGHT + LEGEND_ROW * rows), dpi=DPI, layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=share_y)[0]
    for axes, panel in zip(all_axes, panels):
        _draw_panel(axes, _drawable(panel))
    entries = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside lower center",
            ncols=columns,
            fontsize=8.5,
            title=note or None,
            title_fontsize=8.5,
            frameon=False,
            handlelength=2.8,
        )
    _save(figure, path)


def _drawable(panel: Panel) -> Panel:
    """The panel without what no axis can show, breaks kept: a run that went wrong leaves the others readable."""

    def can_be_drawn(point: tuple) -> bool:
        in_range = all(abs(value) < BEYOND_ALL_PLOTS for value in point)
        return in_range and not (panel.log_x and point[0] <= 0) and not (panel.log_y and min(point[1:]) <= 0)

    curves = [
        replace(curve, points=[point for point in curve.points if point is BREAK or can_be_drawn(point)])
        for curve in panel.curves
    ]
    return replace(panel, curves=curves)


def _draw_panel(axes, panel: Panel) -> None:
    if panel.x_ticks:
        axes.set_xticks(panel.x_ticks)
        x = [point[0] for curve in panel.curves for point in curve.points if point is not BREAK and not curve.level]
        axes.set_xlim(min(*x, *panel.x_ticks) - 0.05, max(*x, *panel.x_ticks) + 0.05)
    if panel.log_x:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis, [point[0] for curve in panel.curves for point in curve.points if not curve.level])
    if panel.log_y:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis, [point[1] for curve in panel.curves for point in curve.points])
    for curve in panel.curves:
        alpha = 0.55 if curve.muted else 1.0
        if curve.level:
            for _, y, *_ in curve.points[:1]:
                axes.axhline(y, color=curve.colour, linestyle="-.", linewidth=1.2, alpha=alpha, label=curve.label)
            continue
        x, y, low, high = zip(*curve.points) if curve.points else ((), (), (), ())
        spread = any(below < value or value < above for value, below, above in zip(y, low, high))
        axes.errorbar(
            x,
            y,
            yerr=[[max(v - b, 0) for v, b in zip(y, low)], [max(a - v, 0) for v, a in zip(y, high)]]
            if spread
            else None,
            label=curve.label,
            color=curve.colour,
            alpha=alpha,
            linestyle=curve.line,
            linewidth=1.2 if curve.muted or not curve.filled else 1.6,
            marker=curve.marker,
            markersize=3.5 if curve.muted else 6,
            markerfacecolor=curve.colour if curve.filled else "white",
            capsize=3,
        )
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.set_title(panel.title, fontsize=10)
    axes.grid(True, which="major", alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_ticks(axis, values: Sequence[float]) -> None:
    """Plain numbers on a logarithmic axis, closer together where it spans little."""
    positive = [value for value in values if value > 0]
    span = max(positive) / min(positive) if positive else 1
    halves = [half / 2 for half in range(2, 20)]
    steps = halves if span < 2 else range(1, 10) if span < 4 else (1, 2, 3, 5, 7) if span < 12 else (1, 2, 5)
    if span > 1e4:
        steps = (1,)
    axis.set_major_locator(LogLocator(base=10, subs=tuple(steps), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(which="minor", size=0)


def _save(figure: Figure, path: Path) -> None:
    """The figure as a PNG, written whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_bytes(path, content.getvalue())
