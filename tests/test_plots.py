"""The plots: what is drawn where, before and after it becomes a picture."""

import random

import pandas as pd
import pytest
from matplotlib.figure import Figure

from kv_compression.reporting import collecting, comparing, drawing, plotting
from tests.made_results import BASELINES, grid, group_of, put, results, scores, write


def averages(folder, *contents) -> pd.DataFrame:
    """One row for each point, under the protocol matched, runs of the protocol paper token-weighted."""
    group = group_of(folder, *contents)
    paper = collecting.points(group, "paper", "matched")
    found = (collecting.points(group, "matched"), paper[paper.foreign])
    return pd.concat(map(comparing.average, found), ignore_index=True)


def scored(folder) -> pd.DataFrame:
    """One row for each scored file below the folder."""
    (found,) = collecting.collect(folder).scores
    return found.rows


@pytest.mark.parametrize("span", [1, 1.001, 1.1, 1.4, 1.6, 2.5, 3.9, 9, 40, 1e3, 1e6])
@pytest.mark.parametrize("least", [1.0, 7.3, 25.9, 48.3, 330.0])
def test_the_ticks_of_a_log_axis_are_there_and_do_not_overlap(span, least):
    figure = Figure(figsize=(4, 3), dpi=drawing.DPI)
    axes = figure.subplots()
    values = [(place, y, y, y) for place, y in enumerate((least, least * span))]
    drawing.draw_panel(axes, drawing.Panel("y", [drawing.Curve("a", values)]))
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    shown = [tick for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = sorted((t.label1.get_window_extent() for t in shown if t.label1.get_text()), key=lambda box: box.y0)
    assert len(boxes) >= 2
    assert all(one.y1 <= other.y0 for one, other in zip(boxes, boxes[1:]))
    places = [tick.get_loc() for tick in shown]
    assert min(places) <= least * (1 + 1e-6)
    assert max(places) >= least * span * (1 - 1e-6)


def test_every_axis_has_ticks_up_to_its_last_point(tmp_path):
    rows = averages(tmp_path, results("full_attention", 0.0), *grid(seeds=(0, 1)))
    pictures = [plotting.measured(rows), plotting.kept_keys(rows)]
    pictures += [plotting.nominal(rows, "model", same) for same in (False, True)]
    pictures.append(plotting.scores(scored(write(tmp_path / "s", *(scores(m) for m in collecting.METHODS)))))
    for picture in pictures:
        figure = Figure(layout="constrained")
        all_axes = figure.subplots(1, len(picture.panels), squeeze=False, sharey=picture.share_y)[0]
        for axes, panel in zip(all_axes, picture.panels):
            drawing.draw_panel(axes, panel, picture.panels if picture.share_y else ())
        for axes, panel in zip(all_axes, picture.panels):
            points = [point for curve in panel.curves for point in curve.points]
            low, high = min(min(point[1:]) for point in points), max(max(point[1:]) for point in points)
            ticks = axes.get_yticks()
            assert axes.get_ylim()[0] <= min(ticks) <= low < high <= max(ticks) <= axes.get_ylim()[1]
            x = [point[0] for curve in panel.curves for point in curve.points if not curve.level]
            ticks = axes.get_xticks()
            assert panel.rooms or axes.get_xlim()[0] <= min(ticks) <= min(x)
            assert panel.rooms or max(x) <= max(ticks) <= axes.get_xlim()[1]


def test_all_curves_begin_at_full_attention_and_are_joined_alike(tmp_path):
    sparse = grid(ratios=(0.5, 0.9))
    rows, full = averages(tmp_path, *sparse), sparse[0]["perplexity"]
    pictures = [
        (plotting.measured(rows), [(0.0, full), (1.0, full)]),
        (plotting.kept_keys(rows), [(128.0, full)]),
        (plotting.nominal(rows, "model", False), [(0.0, full)]),
        (plotting.shape(rows, full), [(0.0, 1.0)]),
    ]
    for picture, starts in pictures:
        for panel, start in zip(picture.panels, starts):
            own = [curve for curve in panel.curves if not curve.level and not curve.muted and curve.line]
            assert [len(curve.points) for curve in own] == [2] * 4
            assert all(curve.start == pytest.approx(start) for curve in own)
            axes = Figure().subplots()
            drawing.draw_panel(axes, panel)
            solid = [line.get_xydata()[0].tolist() for line in axes.get_lines() if line.get_linestyle() == "-"]
            assert sum(point == pytest.approx(start) for point in solid) == 4


def test_only_what_has_two_points_is_drawn(tmp_path):
    one = averages(tmp_path / "one", results(), results("sink_attention"), results("full_attention", 0.0))
    assert not plotting.measured(one).worth_drawing
    assert not plotting.kept_keys(one).worth_drawing
    lost = results(ratio=0.9) | dict.fromkeys(("removed_fraction", "attended_fraction", "kept_keys_mean"))
    assert not plotting.kept_keys(averages(tmp_path / "lost", results(), lost)).worth_drawing
    assert plotting.kept_keys(averages(tmp_path / "two", results(), results(ratio=0.9))).worth_drawing
    assert not plotting.nominal(one[:0], "model", False).worth_drawing  # the published figures alone
    some = write(tmp_path / "scores", scores("kv_compression"), scores("local_attention"))
    assert not plotting.scores(scored(some)).worth_drawing


def test_kept_keys_name_the_best_variants_by_number(tmp_path):
    draw = random.Random(0)
    runs = grid(protocols=("paper", "matched"))
    runs += [results("sink_attention", ratio, sink_tokens=1) for ratio in collecting.GRID]
    runs += [results(nll=draw.uniform(3, 5), kept=draw.uniform(20, 99), recent_tokens=n) for n in range(1, 36)]
    rows = averages(tmp_path, *runs)
    variants = rows.dropna(subset="number")
    assert sorted(variants.number) == list(range(1, 36))
    (panel,) = plotting.kept_keys(rows).panels
    labels = [curve.label for curve in panel.curves]
    assert len(labels) == len(set(labels)) == 9
    assert {"sink attention, sinks 4", "sink attention, sinks 1", "KV compression, protocol paper"} < set(labels)
    *_, rest, best = panel.curves
    assert (len(rest.points) + len(best.points), rest.names) == (35, ())
    at = {f"{row.number:.0f}": (row.kept_keys_mean, row.perplexity) for row in variants.itertuples()}
    assert [point[:2] for point in best.points] == [at[name] for name in best.names]
    beaten = {name for name, own in at.items() if any(o[0] < own[0] and o[1] < own[1] for o in at.values())}
    assert set(best.names) == at.keys() - beaten


@pytest.mark.parametrize(
    ("points", "names", "others", "written"),
    [
        ([(0.1, 0.9), (0.11, 0.89), (0.5, 0.5)], "3 12 7", [], {"3, 12": ("center", "top"), "7": ("right", "top")}),
        ([(0.5, 0.5)], "7", [(0.46, 0.46)], {"7": ("left", "bottom")}),
        ([(0.5, 0.5)], "7", [(0.54, 0.54)], {"7": ("right", "top")}),
    ],
)
def test_a_name_stands_where_no_other_mark_is_and_those_together_are_one(points, names, others, written):
    axes = Figure(figsize=(4, 3), dpi=100).subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    curve = drawing.Curve("a", [(x, y, y, y) for x, y in points], names=names.split())
    drawing.write_names(axes, curve, [*points, *others])
    found = {text.get_text(): (text.get_horizontalalignment(), text.get_verticalalignment()) for text in axes.texts}
    assert found.keys() == written.keys()
    assert len(points) > 1 or found == written


@pytest.mark.parametrize("seeds", [1, 3])
def test_scores_at_one_ratio_stand_side_by_side(tmp_path, seeds):
    ratios = {"full_attention": (0.0,)} | dict.fromkeys(("kv_compression", *BASELINES), collecting.GRID)
    runs = [(method, ratio, seed) for method, those in ratios.items() for ratio in those for seed in range(seeds)]
    for number, (method, ratio, seed) in enumerate(runs):
        put(tmp_path / str(number) / "results.json", results(method, ratio, seed=seed))
        put(tmp_path / str(number) / "scores.json", scores(method, ratio))
    for panel in plotting.scores(scored(tmp_path)).panels:
        levels = [curve for curve in panel.curves if curve.level]
        assert [curve.label for curve in levels] == ["full attention"]
        places = sorted(point[0] for curve in panel.curves if not curve.level for point in curve.points)
        assert [round(place) for place in places] == [place for place in range(9) for _ in range(4 * seeds)]
        apart = min(after - before for before, after in zip(places, places[1:]))
        size = max(curve.size for curve in panel.curves if not curve.level) / 72  # inches
        assert apart * drawing.WIDTH * 0.85 / 9 > 0.9 * size


def test_scores_of_variants_stand_beside_the_plain_method(tmp_path):
    for number, changes in enumerate(({}, {"recent_tokens": 15}, {"sink_tokens": 1}, {"method": "sink_attention"})):
        run = results(**changes)
        put(tmp_path / str(number) / "results.json", run)
        put(tmp_path / str(number) / "scores.json", scores(run["method"]))
    for panel in plotting.scores(scored(tmp_path).sort_values(["method", "variant"])).panels:
        assert [(curve.label, len(curve.points)) for curve in panel.curves] == [
            ("KV compression", 1),
            (plotting.VARIANTS, 2),
            ("sink attention", 1),
        ]
        places = [point[0] for curve in panel.curves for point in curve.points]
        assert places == sorted(set(places))
