"""Pictures as PNG and SVG files: panels above one legend, with ticks and names that do not overlap."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

from kv_compression.io.results import write_bytes

DPI = 150
WIDTH, HEIGHT, LEGEND_ROW = 9.0, 3.8, 0.24  # inches: the figure, the panels, a line of the legend
GREY = "#7F7F7F"
LARGEST = 1e30  # larger values are not drawn
NARROW, WIDENED = 1.5, 1.5  # a log axis that spans a smaller factor is widened by this one on both sides
ENDS = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9, 10)  # × a power of ten: the first and the last tick of a log axis
APART = 0.09  # least share of an axis between its first or last tick and the next
ROOM, ROOM_FOR_NAMES = 0.02, 0.1  # the share outside these two; more where names stand below points
NEAR = (28, 17)  # pixels across and up, around a name; names of points nearer than this are written as one
SIDES = (
    (-1, -1),
    (0, -1),
    (1, -1),
    (-1, 1),
    (0, 1),
    (1, 1),
)  # of a point, where its name may stand: the first with most room


@dataclass(frozen=True)
class Curve:
    """Points `(x, y, lowest, highest)`, in order, and how they look; a level is one line across at the first y.

    `names` may give a text for each point. The line of several points begins at `start`, which has no mark.
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
    """One pair of axes. `x_ticks` are texts by place; with `rooms` each has room for points side by side."""

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
    """Panels, side by side or `stacked`, above one legend with the title `note`."""

    panels: Sequence[Panel]
    note: str = ""
    share_y: bool = False
    stacked: bool = False

    @property
    def worth_drawing(self) -> bool:
        """Whether any measured curve has two points that can be drawn."""
        own = [c for panel in self.panels for c in drawable(panel).curves if not c.muted and not c.level]
        return any(len(curve.points) > 1 for curve in own)


# A "$" in a name is a dollar; the text of an SVG stays text.
@matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "report", "svg.fonttype": "none"})
def draw(path: Path, picture: Picture) -> None:
    """Write a picture as a PNG, and as an SVG beside it; the same picture gives the same bytes.

    Equal labels in several panels are one entry of the legend. RunError if the disk refuses.
    """
    panels = [drawable(panel) for panel in picture.panels]
    labels = {curve.label for panel in panels for curve in panel.curves if curve.label and curve.points}
    columns = 3 if max(map(len, labels), default=0) < 40 else 2
    rows = -(-len(labels) // columns) + bool(picture.note)
    height = 2.2 * len(panels) if picture.stacked else HEIGHT
    figure = Figure(figsize=(WIDTH, height + LEGEND_ROW * rows), dpi=DPI, layout="constrained")
    grid = (len(panels), 1) if picture.stacked else (1, len(panels))
    all_axes = figure.subplots(*grid, squeeze=False, sharey=picture.share_y, sharex=picture.stacked).flatten()
    entries = {}
    for axes, panel in zip(all_axes, panels):
        draw_panel(axes, panel, panels if picture.share_y else ())
        for handle, label in zip(*axes.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    if entries:
        look = {"loc": "outside lower center", "frameon": False, "handlelength": 2.8, "fontsize": 8.5}
        look |= {"ncols": columns, "title": picture.note or None, "title_fontsize": 8.5}
        figure.legend(entries.values(), entries.keys(), **look)
    png, small, svg = io.BytesIO(), io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png")
    Image.open(png).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    figure.savefig(svg, format="svg", metadata={"Date": None})
    write_bytes(path.with_suffix(".png"), small.getvalue())
    write_bytes(path.with_suffix(".svg"), svg.getvalue())


def drawable(panel: Panel) -> Panel:
    """The panel without points that no axis can show, so that one failed run leaves the others readable."""

    def can_be_drawn(point: tuple) -> bool:
        in_range = all(abs(value) < LARGEST for value in point)
        return in_range and not (panel.log_x and point[0] <= 0) and not (panel.log_y and min(point[1:]) <= 0)

    curves = []
    for curve in panel.curves:
        kept = [place for place, point in enumerate(curve.points) if can_be_drawn(point)]
        names = [curve.names[place] for place in kept] if curve.names else ()
        start = curve.start if curve.start and can_be_drawn((*curve.start, curve.start[1])) else None
        curves.append(replace(curve, points=[curve.points[place] for place in kept], names=names, start=start))
    return replace(panel, curves=curves)


def draw_panel(axes, panel: Panel, beside: Sequence[Panel] = ()) -> None:
    """Draw a panel; `beside` are all panels that share its y axis, itself among them."""
    _set_scales(axes, panel, beside or (panel,))
    for curve in panel.curves:
        if curve.points:
            _draw_curve(axes, curve)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.set_title(panel.title, fontsize=10)
    axes.grid(True, which="major", axis="y" if panel.rooms else "both", alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    marks = [point[:2] for curve in panel.curves for point in curve.points if not curve.level]
    for curve in panel.curves:
        write_names(axes, curve, marks)


def _draw_curve(axes, curve: Curve) -> None:
    alpha = 0.55 if curve.muted else 1.0
    x, y, low, high = map(np.array, zip(*curve.points))
    if curve.level:
        axes.axhline(y[0], color=curve.colour, linestyle="-.", linewidth=1.2, alpha=alpha, label=curve.label)
        return
    thin = curve.muted or not curve.filled
    look = {"color": curve.colour, "alpha": alpha, "linestyle": curve.line, "linewidth": 1.2 if thin else 1.6}
    if curve.start and len(x) > 1:
        axes.plot((curve.start[0], x[0]), (curve.start[1], y[0]), zorder=2, **look)
    bars = np.maximum([y - low, high - y], 0)
    look |= {"marker": curve.marker, "markersize": 3.5 if curve.muted else curve.size, "label": curve.label}
    look |= {"markerfacecolor": curve.colour if curve.filled else "white", "zorder": 2 if curve.muted else 2.5}
    axes.errorbar(x, y, yerr=bars if bars.any() else None, capsize=3, **look)


def _set_scales(axes, panel: Panel, beside: Sequence[Panel]) -> None:
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
        _log_ticks(axes.yaxis, y, ROOM_FOR_NAMES if any(curve.names for curve in panel.curves) else ROOM)
    elif y:
        ticks = MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)).tick_values(min(y), max(y))
        axes.set_yticks(ticks)
        axes.set_ylim(ticks[0], ticks[-1])


def write_names(axes, curve: Curve, marks: Sequence[tuple[float, float]]) -> None:
    """Write a curve's names beside its points, where `marks` leave most room, or below several that are near."""
    near: list[list[tuple]] = []
    for name, (x, y, *_) in zip(curve.names, curve.points):
        place = axes.transData.transform((x, y))
        group = next((those for those in near if (abs(place - those[0][0]) < NEAR).all()), None)
        if group is None:
            near.append(group := [])
        group.append((place, (x, y), name))
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
    """The one of `SIDES` of a place that is furthest from all marks but its own; places are in pixels."""
    others = [mark for mark in marks if math.dist(mark, place) > 1]
    room = {
        side: min((math.dist(mark, place + np.multiply(NEAR, side)) for mark in others), default=1e9) for side in SIDES
    }
    return max(SIDES, key=room.get)


def _log_ticks(axis, values: Sequence[float], room: float = ROOM) -> None:
    """Plain numbers on a logarithmic axis, from below the least value to above the largest, and `room` outside them.

    They are closer together where the axis spans little, and nowhere so close that they overlap.
    """
    positive = [value for value in values if value > 0] or [1]
    least, most = min(positive), max(positive)
    if most / least < NARROW:
        least, most = least / WIDENED, most * WIDENED
    span = most / least
    halves = np.arange(1, 10, 0.5)
    steps = halves if span < 2 else range(1, 10) if span < 4 else (1, 2, 3, 5, 7) if span < 12 else (1, 2, 5)
    steps, ends = ((1,), (1, 10)) if span > 1e4 else (steps, ENDS)
    powers = 10.0 ** np.arange(math.floor(math.log10(least)) - 1, math.ceil(math.log10(most)) + 1)
    outer = np.outer(powers, ends).flatten()
    first, last = outer[outer <= least * (1 + 1e-9)].max(), outer[outer >= most * (1 - 1e-9)].min()
    length = math.log(last / first)
    inner = np.sort(np.outer(powers, steps).flatten())
    inner = inner[(inner > first * math.exp(APART * length)) & (inner < last / math.exp(APART * length))]
    axis.set_major_locator(FixedLocator([first, *inner, last]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    outside = math.exp(room * length)
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(first / outside, last * outside)
