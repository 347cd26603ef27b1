"""The report's plots: which curves stand in which picture. Colour-blind readers can tell the colours apart.

Curves are rows of `comparing.average`, one per method, variant and ratio; the published figures stand beside them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pandas as pd

from kv_compression.methods import METHODS
from kv_compression.reporting import published
from kv_compression.reporting.collecting import FULL, KV, SINK, label
from kv_compression.reporting.drawing import GREY, WIDTH, Curve, Panel, Picture

ORANGE = "#E69F00"  # of the palette of Okabe and Ito, as the methods' colours
SINK_MARKERS = "dXvp"  # of sink attention with other numbers of sinks
VARIANTS = "variants of KV compression"
PERPLEXITY, ASKED = "test perplexity (log scale)", "compression ratio asked for"
RATIOS = {tenths / 10: f"{tenths / 10:g}" for tenths in range(10)}
SHARES = {tenths / 10: f"{tenths / 10:g}" for tenths in range(0, 11, 2)}
AXES_OF_SCORES = {"rouge_l": "ROUGE-L F1", "bertscore": "BERTScore F1", "perplexity": "perplexity\n(log scale)"}


def nominal(rows: pd.DataFrame, model: str, same_model: bool) -> Picture:
    """Test perplexity against the ratio asked for, the published figures beside ours."""
    ours = _curves(rows, "ratio")
    panels = [
        Panel(PERPLEXITY, ours, f"ours: {model[:40]}", ASKED, RATIOS),
        Panel(PERPLEXITY, _published(published.perplexities), "published: RedPajama-3B on WikiText-2", ASKED, RATIOS),
    ]
    return Picture(panels, _bars(ours), share_y=same_model)


def shape(rows: pd.DataFrame, full: float) -> Picture:
    """Perplexity as a multiple of the same source's of full attention, which is `full` for ours."""
    heights = ["perplexity", "lowest", "highest"]
    multiples = rows[rows.method != FULL].assign(**(rows[heights] / full))
    ours = [replace(curve, start=(0.0, 1.0)) for curve in _curves(multiples, "ratio")]
    drawn = [*ours, *_published(published.above_full)]
    return Picture([Panel("test perplexity ÷ full attention's\n(log scale)", drawn, "", ASKED, RATIOS)], _bars(ours))


def measured(rows: pd.DataFrame) -> Picture:
    """Test perplexity against the removed and against the attended share."""
    removed, attended = (_curves(rows, name) for name in ("removed_fraction", "attended_fraction"))
    panels = [
        Panel(PERPLEXITY, removed, "", "share of cache entries removed\nat a block's end", SHARES),
        Panel("", attended, "", "share of earlier keys attended to,\nmean over pairs of text tokens", SHARES),
    ]
    return Picture(panels, _bars(removed), share_y=True)


def kept_keys(rows: pd.DataFrame) -> Picture:
    """Test perplexity against the mean number of kept keys.

    Variants of KV compression are small marks, except those that no other beats in both: these have their numbers.
    """
    varied = (rows.method == KV) & (rows.variant != "")
    drawn, looks = [], iter(SINK_MARKERS)
    several = (rows[~varied].variant != "").any()
    for method, variant, curve in _by_name(rows[~varied], "kept_keys_mean"):
        if several and method == SINK and not variant:
            curve = replace(curve, label=f"{curve.label}, sinks 4")
        elif variant:
            curve = replace(curve, marker=next(looks, "o"), line="--", filled=False)
        drawn.append(curve)
    found = rows[varied].dropna(subset="kept_keys_mean").sort_values(["kept_keys_mean", "perplexity"])
    best = found.perplexity < found.perplexity.cummin().shift(fill_value=float("inf"))
    drawn = _from_full(drawn)
    drawn.append(Curve(VARIANTS, _points(found[~best], "kept_keys_mean"), GREY, "o", "", size=3.5))
    points, names = _points(found[best], "kept_keys_mean"), [f"{number:.0f}" for number in found[best].number]
    drawn.append(Curve("best variants, by number in the table", points, ORANGE, "*", "", size=9, names=names))
    words = "keys held while a token is read, a span still being read in full,\nmean over tokens (log scale)"
    return Picture([Panel(PERPLEXITY, drawn, "", words, log_x=True)], _bars(drawn))


def one_ratio(runs: Sequence[tuple[str, str, float]]) -> Picture:
    """Test perplexity of methods side by side, one `(method, name, perplexity)` per run; variants are stars."""
    curves, ticks = [], {}
    for method, name, value in sorted(runs, key=lambda run: run[2]):
        if method == FULL:
            curves.append(_of_method(method, f"{name}: {value:.1f}", [(0.0, value, value, value)]))
            continue
        place = float(len(ticks))
        ticks[place] = f"{name}\n{value:.1f}"
        look = _of_method(method, "", [(place, value, value, value)], "", size=9)
        plain = name == label(method)
        curves.append(look if plain else replace(look, colour=ORANGE, marker="*", size=13))
    return Picture([Panel(PERPLEXITY, curves, x_ticks=ticks, rooms=True)])


def scores(rows: pd.DataFrame) -> Picture:
    """Claim 2's three scores against the ratio asked for: at each ratio methods, and their seeds, side by side.

    Rows are those of `collecting.ScoredSet`, in the order in which they stand side by side.
    """
    rows = rows.reset_index(drop=True)
    rows = rows.assign(hollow=rows.sentinels & (rows.protocol == "paper"), varied=rows.variant != "")
    full = rows[(rows.method == FULL) & ~rows.varied]
    rows = rows.drop(full.index)
    kinds = list(rows.groupby(["method", "hollow", "varied"], sort=False))
    widths = [own.groupby("ratio").size().max() for _, own in kinds]
    ratios = sorted(set(rows.ratio))
    gap = 0.7 * any(width > 1 for width in widths)  # between methods
    total = max(sum(widths), 1) + gap * (len(kinds) - 1)
    step = min(0.84 / total, 0.12)
    size = 6 if step * WIDTH / max(len(ratios), 1) > 0.1 else 3.5
    curves = {metric: [] for metric in AXES_OF_SCORES}
    for metric in AXES_OF_SCORES if len(full) else ():
        level = _score_points(full.assign(place=0.0), metric).mean()
        curves[metric] += [_of_method(FULL, label(FULL), [tuple(level)])] if level.notna().all() else []
    column = (1 - total) / 2
    for ((method, hollow, varied), own), width in zip(kinds, widths):
        there = own.groupby("ratio")
        beside = column + (width - there.path.transform("size")) / 2 + there.cumcount()
        own = own.assign(place=own.ratio.map(ratios.index) + step * beside)
        column += width + gap
        for metric in AXES_OF_SCORES:
            name = (VARIANTS if varied else label(method)) + ", protocol paper" * hollow
            points = [tuple(point) for point in _score_points(own, metric).to_numpy()]
            curve = _of_method(method, name, points, "", filled=not hollow, size=size)
            curves[metric].append(replace(curve, colour=ORANGE, marker="*", size=1.5 * size) if varied else curve)
    ticks = {place: f"{ratio:g}" for place, ratio in enumerate(ratios)}
    panels = [
        Panel(words, curves[metric], x_ticks=ticks, rooms=True, log_y=metric == "perplexity")
        for metric, words in AXES_OF_SCORES.items()
    ]
    panels[-1] = replace(panels[-1], x_label=ASKED)
    return Picture(panels, "bars: 95% bootstrap interval over documents, a bar a file", stacked=True)


def _score_points(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    return rows[["place", metric, f"{metric}_low", f"{metric}_high"]].dropna()


def _points(rows: pd.DataFrame, x: str) -> list[tuple]:
    return list(rows[[x, "perplexity", "lowest", "highest"]].dropna().itertuples(index=False, name=None))


def _by_name(rows: pd.DataFrame, x: str) -> list[tuple[str, str, Curve]]:
    """The method, the variant and the curve of each method and variant that was measured."""
    found = []
    for (method, variant, foreign), own in rows.groupby(["method", "variant", "foreign"], sort=False):
        name = ", ".join(filter(None, [label(method), variant, "protocol paper" * foreign]))
        look = {"line": "--", "filled": False} if foreign else {}
        found.append((method, variant, _of_method(method, name, _points(own, x), **look)))
    return found


def _curves(rows: pd.DataFrame, x: str) -> list[Curve]:
    return _from_full([curve for *_, curve in _by_name(rows, x)])


def _from_full(curves: Sequence[Curve]) -> list[Curve]:
    """The curves, all starting at full attention, which every method is at ratio 0."""
    start = next((curve.points[0][:2] for curve in curves if curve.level and curve.points), None)
    return [curve if curve.level else replace(curve, start=start) for curve in curves]


def _of_method(method: str, name: str, points: Sequence[tuple], line: str = "-", **changes) -> Curve:
    """A curve in the method's colour and with its marker."""
    rule = METHODS.get(method)
    colour, marker = (rule.colour, rule.marker) if rule else (GREY, "o")
    return Curve(name, points, colour, marker, line, level=method == FULL, **changes)


def _published(figures: Callable[[str, str], dict[float, float]]) -> list[Curve]:
    """The published curves, in their methods' colours, muted: the paper's dashed, the reproduction's dotted."""
    return [
        _of_method(method, f"{label(method)}, {source}", [(x, y, y, y) for x, y in by_ratio.items()], line, muted=True)
        for source, line in zip(published.SOURCES, ("--", ":"))
        for method in published.METHODS
        if (by_ratio := figures(source, method))
    ]


def _bars(curves: Iterable[Curve]) -> str:
    """What the error bars mean, "" if there are none."""
    several = any(low < high for curve in curves for _, _, low, high in curve.points)
    return "bars: lowest to highest seed" if several else ""
