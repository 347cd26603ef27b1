"""The report's plots as PNG and SVG files: panels above one legend, in colours that colour-blind readers tell apart.

Draws points and scores as `report` has them, and the published figures; compares nothing.
"""

import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from kv_compression.io.results import write_bytes
from kv_compression.reporting import published

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
_SINK_MARKERS = ("d", "X", "v", "p")  # sink attention with other numbers of sinks
VARIANTS = "variants of KV compression"
PERPLEXITY, ASKED = "test perplexity (log scale)", "compression ratio asked for"
RATIOS = {tenths / 10: f"{tenths / 10:g}" for tenths in range(10)}
SHARES = {tenths / 10: f"{tenths / 10:g}" for tenths in range(0, 11, 2)}
BEYOND_ALL_PLOTS = 1e30
NARROW, WIDENED = 1.5, 1.5  # a log axis whose values span less gets so much room on both sides
ENDS = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9, 10)  # × a power of ten: the first and the last tick of a log axis
APART = 0.09  # of an axis's length, between its first or last tick and the next
BEYOND, FOR_NAMES = 0.02, 0.1  # of it, beyond those; and where names stand below points
NEAR = (28, 17)  # pixels across and up, about a name; names of points that are no further apart are written as one
SIDES = ((-1, -1), (0, -1), (1, -1), (-1, 1), (0, 1), (1, 1))  # of a point, for its name; the first with most room


@dataclass(frozen=True)
class Curve:
    """Points `(x, y, lowest, highest)`, in order, and how they look; a level is one line across at the first y.

    `names` may say for each point what is written beside it. The line of several begins at `start`, which has no mark.
    """

    label: str
    points: Sequence[tuple[float, float, float, float]]
    colour: str = GREY
    marker: str = "o"
    line: str = "-"
    filled: bool = True
    muted: bool = False
    level: bool = False
    size: float = 6
    names: Sequence[str] = ()
    start: tuple[float, float] | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `x_ticks` are the texts at places; with `rooms` each has room for what stands side by side."""

    y_label: str
    curves: Sequence[Curve]
    title: str = ""
    x_label: str = ""
    x_ticks: Mapping[float, str] = field(default_factory=dict)
    rooms: bool = False
    log_x: bool = False
    log_y: bool = True


@dataclass(frozen=True)
class Picture:
    """Panels, side by side or `stacked`, above one legend that `note` heads."""

    panels: Sequence[Panel]
    note: str = ""
    share_y: bool = False
    stacked: bool = False

    @property
    def worth_drawing(self) -> bool:
        """Whether anything that was measured here has two points that can be drawn."""
        own = [c for panel in self.panels for c in _drawable(panel).curves if not c.muted and not c.level]
        return any(len(curve.points) > 1 for curve in own)


def nominal(curves: Sequence[Sequence], model: str, same_model: bool) -> Picture:
    """Test perplexity against the ratio asked for, the published figures beside ours."""
    ours = _curves(curves, lambda point: point.ratio)
    panels = [
        Panel(PERPLEXITY, ours, f"ours: {model[:40]}", ASKED, RATIOS),
        Panel(PERPLEXITY, _published(published.perplexities), "published: RedPajama-3B on WikiText-2", ASKED, RATIOS),
    ]
    return Picture(panels, _bars(ours), share_y=same_model)


def shape(curves: Sequence[Sequence], full: float) -> Picture:
    """Perplexity as a multiple of the same source's of full attention, which is `full` for ours."""
    ours = [replace(curve_of(curve, lambda point: point.ratio, full), start=(0.0, 1.0)) for curve in curves]
    drawn = [*ours, *_published(published.above_full)]
    return Picture([Panel("test perplexity ÷ full attention's\n(log scale)", drawn, "", ASKED, RATIOS)], _bars(ours))


def measured(curves: Sequence[Sequence]) -> Picture:
    """Test perplexity against the removed and against the attended share."""
    removed, attended = (
        _curves(curves, lambda point, name=name: point.mean(name)) for name in ("removed_fraction", "attended_fraction")
    )
    panels = [
        Panel(PERPLEXITY, removed, "", "share of cache entries removed\nat a block's end", SHARES),
        Panel("", attended, "", "share of earlier keys attended to,\nmean over pairs of text tokens", SHARES),
    ]
    return Picture(panels, _bars(removed), share_y=True)


def kept_keys(curves: Sequence[Sequence], variants: Sequence[tuple]) -> Picture:
    """Test perplexity against the mean number of kept keys.

    `variants` of KV compression come with their numbers. They are small marks, but for those that no other beats in
    both: these are numbered.
    """

    def kept(point) -> float | None:
        return point.mean("kept_keys_mean")

    drawn, looks = [], iter(_SINK_MARKERS)
    several = any(curve[0].variant for curve in curves)
    for curve, one in zip(curves, _curves(curves, kept)):
        if several and curve[0].method == "sink_attention" and not curve[0].variant:
            one = replace(one, label=f"{one.label}, sinks 4")
        elif curve[0].variant:
            one = replace(one, marker=next(looks, "o"), line="--", filled=False)
        drawn.append(one)
    marks = [curve_of([point], kept) for point, _ in variants]
    marks = [(mark.points[0], str(number)) for mark, (_, number) in zip(marks, variants) if mark.points]
    best = front(marks)
    rest = [point for point, name in marks if (point, name) not in best]
    drawn.append(Curve(VARIANTS, rest, GREY, "o", "", size=3.5))
    points, names = [point for point, _ in best], [name for _, name in best]
    drawn.append(Curve("best variants, by number in the table", points, ORANGE, "*", "", size=9, names=names))
    words = "keys held while a token is read, a span still being read in full,\nmean over tokens (log scale)"
    return Picture([Panel(PERPLEXITY, drawn, "", words, log_x=True)], _bars(drawn))


def one_ratio(runs: Sequence[tuple[str, str, float]]) -> Picture:
    """Test perplexity of methods side by side: of `(method, name, perplexity)` of one run each, variants by a star."""
    curves, ticks = [], {}
    for method, name, value in sorted(runs, key=lambda run: run[2]):
        if method == published.FULL:
            curves.append(_of_method(method, f"{name}: {value:.1f}", [(0.0, value, value, value)]))
            continue
        place = float(len(ticks))
        ticks[place] = f"{name}\n{value:.1f}"
        look = _of_method(method, "", [(place, value, value, value)], "", size=9)
        plain = name == label(method)
        curves.append(look if plain else replace(look, colour=ORANGE, marker="*", size=13))
    return Picture([Panel(PERPLEXITY, curves, x_ticks=ticks, rooms=True)])


def front(marks: Sequence[tuple]) -> list[tuple]:
    """Of marks `((x, y, …), name)` those that no other is left of and below, from left to right."""
    found = []
    for mark in sorted(marks, key=lambda mark: mark[0][:2]):
        if not found or mark[0][1] < found[-1][0][1]:
            found.append(mark)
    return found


def scores(found: Sequence) -> Picture:
    """Claim 2's three scores against the ratio asked for: at each ratio methods, and their seeds, side by side.

    Variants, of KV compression, stand beside the plain method, in the order that `found` has.
    """
    kinds: dict[tuple[str, bool, bool], list] = {}
    for score in found:
        kind = (score.method, score.has_sentinels and score.protocol == "paper", bool(score.variant))
        kinds.setdefault(kind, []).append(score)
    full = kinds.pop((published.FULL, False, False), [])
    ratios = sorted({score.ratio for those in kinds.values() for score in those})
    columns = {
        kind: max(sum(score.ratio == ratio for score in those) for ratio in ratios) for kind, those in kinds.items()
    }
    gap = 0.7 * any(count > 1 for count in columns.values())  # between methods
    total = max(sum(columns.values()), 1) + gap * (len(kinds) - 1)
    step = min(0.84 / total, 0.12)
    ticks = {place: f"{ratio:g}" for place, ratio in enumerate(ratios)}
    size = 6 if step * WIDTH / max(len(ratios), 1) > 0.1 else 3.5
    panels = []
    for metric, words in (("rouge_l", "ROUGE-L F1"), ("bertscore", "BERTScore F1"), ("perplexity", "perplexity")):
        curves = []
        values = [value for score in full if (value := _estimate(score, metric))]
        if values:
            level = (0.0, *(statistics.fmean(column) for column in zip(*values)))
            curves.append(_of_method(published.FULL, label(published.FULL), [level]))
        column = 0
        for kind, those in kinds.items():
            method, hollow, varied = kind
            points = []
            for place, ratio in enumerate(ratios):
                there = [value for score in those if score.ratio == ratio and (value := _estimate(score, metric))]
                first = column + (columns[kind] - len(there)) / 2
                points += [
                    (place + step * (first + number + (1 - total) / 2), *value) for number, value in enumerate(there)
                ]
            column += columns[kind] + gap
            name = VARIANTS * varied or label(method)
            look = _of_method(method, name + ", protocol paper" * hollow, points, "", filled=not hollow, size=size)
            curves.append(replace(look, colour=ORANGE, marker="*", size=1.5 * size) if varied else look)
        log_y = metric == "perplexity"
        panels.append(Panel(words + "\n(log scale)" * log_y, curves, x_ticks=ticks, rooms=True, log_y=log_y))
    panels[-1] = replace(panels[-1], x_label=ASKED)
    return Picture(panels, "bars: 95% bootstrap interval over documents, a bar a file", stacked=True)


def _estimate(score, metric: str) -> tuple[float, float, float] | None:
    """A score's mean and interval, None if it lacks one of them."""
    values = tuple(score.content[metric].get(name) for name in ("mean", "low", "high"))
    return values if all(isinstance(value, int | float) for value in values) else None


def label(method: str) -> str:
    """A method's name for readers."""
    return method.replace("kv_", "KV ").replace("_", " ")


def _curves(curves: Sequence[Sequence], x: Callable) -> list[Curve]:
    """A curve a method; all of them begin where full attention is, which is every method at ratio 0."""
    drawn = [curve_of(curve, x) for curve in curves]
    start = next((curve.points[0][:2] for curve in drawn if curve.level and curve.points), None)
    return [curve if curve.level else replace(curve, start=start) for curve in drawn]


def curve_of(points: Iterable, x: Callable, unit: float = 1.0) -> Curve:
    """Points of one method: mean and range over seeds ÷ `unit`."""
    drawn = []
    points = [point for point in points if x(point) is not None]
    for point in points:
        seeds = [value / unit for value in point.perplexities]
        drawn.append((x(point), statistics.fmean(seeds), min(seeds), max(seeds)))
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


# A "$" in a name is a dollar; the text of an SVG stays text.
@matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "report", "svg.fonttype": "none"})
def draw(path: Path, picture: Picture) -> None:
    """Write a picture as a PNG, and as an SVG beside it. Equal labels in several panels are one entry of the legend.

    RunError if the disk refuses.
    """
    panels = [_drawable(panel) for panel in picture.panels]
    labels = {curve.label for panel in panels for curve in panel.curves if curve.label and curve.points}
    longest = max(map(len, labels), default=0)
    columns = 3 if longest < 40 else 2
    rows = -(-len(labels) // columns) + bool(picture.note)
    height = 2.2 * len(panels) if picture.stacked else HEIGHT
    figure = Figure(figsize=(WIDTH, height + LEGEND_ROW * rows), dpi=DPI, layout="constrained")
    grid = (len(panels), 1) if picture.stacked else (1, len(panels))
    all_axes = figure.subplots(*grid, squeeze=False, sharey=picture.share_y, sharex=picture.stacked).flatten()
    for axes, panel in zip(all_axes, panels):
        _draw_panel(axes, panel, panels if picture.share_y else (panel,))
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
            title=picture.note or None,
            title_fontsize=8.5,
            frameon=False,
            handlelength=2.8,
        )
    _save(figure, path)


def _drawable(panel: Panel) -> Panel:
    """The panel without what no axis can show: a run that went wrong leaves the others readable."""

    def can_be_drawn(point: tuple) -> bool:
        in_range = all(abs(value) < BEYOND_ALL_PLOTS for value in point)
        return in_range and not (panel.log_x and point[0] <= 0) and not (panel.log_y and min(point[1:]) <= 0)

    curves = []
    for curve in panel.curves:
        kept = [place for place, point in enumerate(curve.points) if can_be_drawn(point)]
        names = [curve.names[place] for place in kept] if curve.names else ()
        start = curve.start if curve.start and can_be_drawn((*curve.start, curve.start[1])) else None
        curves.append(replace(curve, points=[curve.points[place] for place in kept], names=names, start=start))
    return replace(panel, curves=curves)


def _draw_panel(axes, panel: Panel, beside: Sequence[Panel] = ()) -> None:
    """Draw a panel; `beside` are all panels that share its y axis, itself among them."""
    _scale(axes, panel, beside or (panel,))
    for curve in panel.curves:
        if not curve.points:
            continue
        alpha = 0.55 if curve.muted else 1.0
        if curve.level:
            y = curve.points[0][1]
            axes.axhline(y, color=curve.colour, linestyle="-.", linewidth=1.2, alpha=alpha, label=curve.label)
            continue
        thin = curve.muted or not curve.filled
        look = {"color": curve.colour, "alpha": alpha, "linestyle": curve.line, "linewidth": 1.2 if thin else 1.6}
        x, y, low, high = zip(*curve.points)
        if curve.start and len(x) > 1:
            axes.plot((curve.start[0], x[0]), (curve.start[1], y[0]), zorder=2, **look)
        spread = any(below < value or value < above for value, below, above in zip(y, low, high))
        axes.errorbar(
            x,
            y,
            yerr=[[max(v - b, 0) for v, b in zip(y, low)], [max(a - v, 0) for v, a in zip(y, high)]]
            if spread
            else None,
            label=curve.label,
            marker=curve.marker,
            markersize=3.5 if curve.muted else curve.size,
            markerfacecolor=curve.colour if curve.filled else "white",
            capsize=3,
            zorder=2 if curve.muted else 2.5,
            **look,
        )
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.set_title(panel.title, fontsize=10)
    axes.grid(True, which="major", axis="y" if panel.rooms else "both", alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    marks = [point[:2] for curve in panel.curves for point in curve.points if not curve.level]
    for curve in panel.curves:
        _write_names(axes, curve, marks)


def _scale(axes, panel: Panel, beside: Sequence[Panel]) -> None:
    """Scales and ticks: every axis has a tick at or beyond its first and its last point, bars included."""
    x = [point[0] for curve in panel.curves for point in curve.points if not curve.level]
    x += [curve.start[0] for curve in panel.curves if curve.start]
    y = [value for one in beside for curve in one.curves for point in curve.points for value in point[1:]]
    if panel.x_ticks:
        axes.set_xticks(list(panel.x_ticks), list(panel.x_ticks.values()))
        axes.set_xlim(min([*x, *panel.x_ticks]) - 0.05, max([*x, *panel.x_ticks]) + 0.05)
    if panel.rooms:
        axes.set_xlim(min(panel.x_ticks) - 0.5, max(panel.x_ticks) + 0.5)
        for place in list(panel.x_ticks)[1:]:
            axes.axvline(place - 0.5, color=GREY, alpha=0.3, linewidth=0.6)
    if panel.log_x:
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, x)
    if panel.log_y:
        axes.set_yscale("log")
        _log_ticks(axes.yaxis, y, FOR_NAMES if any(curve.names for curve in panel.curves) else BEYOND)
    elif y:
        ticks = MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)).tick_values(min(y), max(y))
        axes.set_yticks(ticks)
        axes.set_ylim(ticks[0], ticks[-1])


def _write_names(axes, curve: Curve, marks: Sequence[tuple[float, float]]) -> None:
    """Write a curve's names at its points, where other `marks` leave most room; those of near points as one, below."""
    near: list[list[tuple]] = []
    for name, (x, y, *_) in zip(curve.names, curve.points):
        place = axes.transData.transform((x, y))
        together = next((those for those in near if (abs(place - those[0][0]) < NEAR).all()), None)
        if together is None:
            near.append(together := [])
        together.append((place, (x, y), name))
    style = {"fontsize": 8, "path_effects": [withStroke(linewidth=2.5, foreground="white")], "zorder": 4}
    there = [axes.transData.transform(mark) for mark in marks]
    for those in near:
        place, point, _ = min(those, key=lambda one: one[0][1])  # the lowest
        across, up = (0, -1) if len(those) > 1 else _side_with_room(place, there)
        aligned = {"ha": ("center", "left", "right")[across], "va": "top" if up < 0 else "bottom"}
        offset = (2.5 * across, (2.5 if across else 6) * up)
        text = ", ".join(name for *_, name in those)
        axes.annotate(text, point, xytext=offset, textcoords="offset points", **style, **aligned)


def _side_with_room(place: np.ndarray, marks: Sequence[np.ndarray]) -> tuple[int, int]:
    """Which of `SIDES` of a place is furthest from all marks but its own; pixels."""
    others = [mark for mark in marks if math.dist(mark, place) > 1]
    room = {
        side: min((math.dist(mark, place + np.multiply(NEAR, side)) for mark in others), default=1e9) for side in SIDES
    }
    return max(SIDES, key=room.get)


def _log_ticks(axis, values: Sequence[float], beyond: float = BEYOND) -> None:
    """Plain numbers on a logarithmic axis, from below the least value to above the largest, and room `beyond` them.

    They are closer together where the axis spans little, and nowhere so close that they overlap.
    """
    positive = [value for value in values if value > 0]
    least, most = (min(positive), max(positive)) if positive else (1, 1)
    if most / least < NARROW:
        least, most = least / WIDENED, most * WIDENED
    span = most / least
    halves = [half / 2 for half in range(2, 20)]
    steps = halves if span < 2 else range(1, 10) if span < 4 else (1, 2, 3, 5, 7) if span < 12 else (1, 2, 5)
    steps, ends = ((1,), (1, 10)) if span > 1e4 else (steps, ENDS)
    first = max(end * 10**power for end in ends for power in _powers(least) if end * 10**power <= least * (1 + 1e-9))
    last = min(end * 10**power for end in ends for power in _powers(most) if end * 10**power >= most * (1 - 1e-9))
    length = math.log(last / first)
    powers = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    between = sorted(step * 10.0**power for power in powers for step in steps)
    between = [tick for tick in between if min(math.log(tick / first), math.log(last / tick)) > APART * length]
    axis.set_major_locator(FixedLocator([first, *between, last]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    room = math.exp(beyond * length)
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(first / room, last * room)


def _powers(value: float) -> tuple[int, int]:
    """The powers of ten about a value."""
    power = math.floor(math.log10(value))
    return power - 1, power


def _save(figure: Figure, path: Path) -> None:
    """The figure as a PNG and an SVG, each written whole or not at all; the same figure gives the same bytes."""
    for ending, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        content = io.BytesIO()
        figure.savefig(content, format=ending[1:], metadata=metadata)
        write_bytes(path.with_suffix(ending), content.getvalue())
