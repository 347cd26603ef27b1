"""The plots: what is drawn where, before and after it becomes a picture."""

import json
import random

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kv_compression.reporting import collecting, plotting
from tests.made_results import grid, group_of, results, scores, write


def points_of(folder, *contents) -> list:
    return collecting.points(group_of(folder, *contents), "matched")


def curves_of(found) -> list[list]:
    curves = {}
    for point in found:
        curves.setdefault(point.name, []).append(point)
    return list(curves.values())


@pytest.mark.parametrize("span", [1, 1.001, 1.1, 1.4, 1.6, 2.5, 3.9, 9, 40, 1e3, 1e6])
@pytest.mark.parametrize("least", [1.0, 7.3, 25.9, 48.3, 330.0])
def test_the_ticks_of_a_log_axis_are_there_and_do_not_overlap(span, least):
    figure = Figure(figsize=(4, 3), dpi=plotting.DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = [(place, y, y, y) for place, y in enumerate((least, least * span))]
    plotting._draw_panel(axes, plotting.Panel("y", [plotting.Curve("a", values)]))
    canvas.draw()
    low, high = axes.get_ylim()
    shown = [tick.label1 for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = sorted((label.get_window_extent() for label in shown if label.get_text()), key=lambda box: box.y0)
    assert len(boxes) >= 2
    assert all(one.y1 <= other.y0 for one, other in zip(boxes, boxes[1:]))
    places = [tick.get_loc() for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert min(places) <= least * (1 + 1e-6)
    assert max(places) >= least * span * (1 - 1e-6)


def test_every_axis_has_ticks_up_to_its_last_point(tmp_path):
    found = points_of(tmp_path, results("full_attention", 0.0), *grid(seeds=(0, 1)))
    pictures = [plotting.measured(curves_of(found)), plotting.kept_keys(curves_of(found), [])]
    pictures += [plotting.nominal(curves_of(found), "model", same) for same in (False, True)]
    pictures += [
        plotting.scores(collecting.collect(write(tmp_path / "s", *(scores(m) for m in collecting.METHODS))).scores[0])
    ]
    for picture in pictures:
        figure = Figure(layout="constrained")
        all_axes = figure.subplots(1, len(picture.panels), squeeze=False, sharey=picture.share_y)[0]
        for axes, panel in zip(all_axes, picture.panels):
            plotting._draw_panel(axes, panel, picture.panels if picture.share_y else ())
        for axes, panel in zip(all_axes, picture.panels):
            points = [point for curve in panel.curves for point in curve.points]
            low, high = min(min(point[1:]) for point in points), max(max(point[1:]) for point in points)
            assert axes.get_ylim()[0] <= min(axes.get_yticks()) <= low < high <= max(axes.get_yticks())
            assert max(axes.get_yticks()) <= axes.get_ylim()[1]
            x = [point[0] for curve in panel.curves for point in curve.points if not curve.level]
            if not panel.rooms:
                assert axes.get_xlim()[0] <= min(axes.get_xticks()) <= min(x)
                assert max(x) <= max(axes.get_xticks()) <= axes.get_xlim()[1]


def test_all_curves_begin_at_full_attention_and_are_joined_alike(tmp_path):
    sparse = grid(ratios=(0.5, 0.9))
    found = points_of(tmp_path, *sparse)
    full = sparse[0]["perplexity"]
    starts = {"measured": [(0.0, full), (1.0, full)], "kept_keys": [(128.0, full)], "nominal": [(0.0, full)]}
    starts["shape"] = [(0.0, 1.0)]
    tuned = [curve for curve in curves_of(found) if curve[0].method != "full_attention"]
    pictures = {
        "measured": plotting.measured(curves_of(found)),
        "kept_keys": plotting.kept_keys(curves_of(found), []),
        "nominal": plotting.nominal(curves_of(found), "model", False),
        "shape": plotting.shape(tuned, full),
    }
    for name, picture in pictures.items():
        for panel, start in zip(picture.panels, starts[name]):
            own = [curve for curve in panel.curves if not curve.level and not curve.muted and curve.line]
            assert [len(curve.points) for curve in own] == [2] * 4
            assert all(curve.start == pytest.approx(start) for curve in own)
            axes = Figure().subplots()
            plotting._draw_panel(axes, panel)
            solid = [line.get_xydata()[0].tolist() for line in axes.get_lines() if line.get_linestyle() == "-"]
            assert solid.count(list(start)) == 4


def test_only_what_has_two_points_is_drawn(tmp_path):
    one = points_of(tmp_path / "one", results(), results("sink_attention"), results("full_attention", 0.0))
    assert not plotting.measured(curves_of(one)).worth_drawing
    assert not plotting.kept_keys(curves_of(one), []).worth_drawing
    lost = results(ratio=0.9) | dict.fromkeys(("removed_fraction", "attended_fraction", "kept_keys_mean"))
    two = points_of(tmp_path / "lost", results(), lost)
    assert not plotting.kept_keys(curves_of(two), []).worth_drawing
    two = points_of(tmp_path / "two", results(), results(ratio=0.9))
    assert plotting.kept_keys(curves_of(two), []).worth_drawing
    assert not plotting.nominal([], "model", False).worth_drawing  # the published figures alone
    (some,) = collecting.collect(write(tmp_path / "scores", scores("kv_compression"), scores("local_attention"))).scores
    assert not plotting.scores(some).worth_drawing


def test_kept_keys_name_the_best_variants_by_number(tmp_path):
    draw = random.Random(0)
    runs = grid(protocols=("paper", "matched"))
    runs += [results("sink_attention", ratio, sink_tokens=1) for ratio in collecting.GRID]
    runs += [
        results(nll=draw.uniform(3, 5), kept=draw.uniform(20, 99), recent_tokens=number) for number in range(1, 36)
    ]
    group = group_of(tmp_path, *runs)
    found = collecting.points(group, "matched") + [p for p in collecting.points(group, "paper", "matched") if p.foreign]
    numbers = collecting.number_variants(group)
    assert sorted(numbers.values()) == list(range(1, 36))
    variants = [(point, numbers["matched", point.variant, point.ratio]) for point in collecting.variants(found)]
    curves = curves_of(point for point in found if point.method != "kv_compression" or not point.variant)
    (panel,) = plotting.kept_keys(curves, variants).panels
    labels = [curve.label for curve in panel.curves]
    assert len(labels) == len(set(labels)) == 9
    assert {"sink attention, sinks 4", "sink attention, sinks 1", "KV compression, protocol paper"} < set(labels)
    *_, rest, best = panel.curves
    assert (len(rest.points) + len(best.points), rest.names) == (35, ())
    at = {str(number): (point.mean("kept_keys_mean"), point.perplexities[0]) for point, number in variants}
    assert [point[:2] for point in best.points] == [at[name] for name in best.names]
    beaten = {name for name, own in at.items() if any(o[0] < own[0] and o[1] < own[1] for o in at.values())}
    assert set(best.names) == at.keys() - beaten
    plotting.draw(tmp_path / "a.png", plotting.kept_keys(curves, variants))
    assert (tmp_path / "a.png").stat().st_size > 10_000
    drawn = (tmp_path / "a.svg").read_bytes()
    assert b"KV compression, protocol paper" in drawn
    plotting.draw(tmp_path / "a.png", plotting.kept_keys(curves, variants))
    assert (tmp_path / "a.svg").read_bytes() == drawn


def test_names_of_points_that_lie_together_are_written_as_one():
    axes = Figure(figsize=(4, 3), dpi=100).subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    points = [(x, y, y, y) for x, y in ((0.1, 0.9), (0.11, 0.89), (0.5, 0.5))]
    plotting._write_names(axes, plotting.Curve("a", points, names=("3", "12", "7")), [point[:2] for point in points])
    assert [text.get_text() for text in axes.texts] == ["3, 12", "7"]


@pytest.mark.parametrize("others, side", [(((0.46, 0.46),), ("left", "bottom")), (((0.54, 0.54),), ("right", "top"))])
def test_a_name_stands_where_no_other_mark_is(others, side):
    axes = Figure(figsize=(4, 3), dpi=100).subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    plotting._write_names(axes, plotting.Curve("a", [(0.5, 0.5, 0.5, 0.5)], names=("7",)), [(0.5, 0.5), *others])
    (text,) = axes.texts
    assert (text.get_horizontalalignment(), text.get_verticalalignment()) == side


@pytest.mark.parametrize("seeds", [1, 3])
def test_scores_at_one_ratio_stand_side_by_side(tmp_path, seeds):
    methods = [*collecting.BASELINES, "kv_compression", "full_attention"]
    runs = [
        results(method, ratio, seed=seed)
        for method in methods
        for ratio in ((0.0,) if method == "full_attention" else collecting.GRID)
        for seed in range(seeds)
    ]
    write(tmp_path, *runs)
    for number, run in enumerate(runs):
        score = scores(run["method"], run["bound_ratio"])
        (tmp_path / f"{number:03}" / "scores.json").write_text(json.dumps(score))
    (found,) = collecting.collect(tmp_path).scores
    picture = plotting.scores(found)
    plotting.draw(tmp_path / "a.png", picture)
    for panel in picture.panels:
        levels = [curve for curve in panel.curves if curve.level]
        assert [curve.label for curve in levels] == ["full attention"]
        places = sorted(point[0] for curve in panel.curves if not curve.level for point in curve.points)
        assert len(places) == 4 * 9 * seeds
        assert [round(place) for place in places] == [place for place in range(9) for _ in range(4 * seeds)]
        apart = min(after - before for before, after in zip(places, places[1:]))
        size = max(curve.size for curve in panel.curves if not curve.level) / 72  # inches
        assert apart * plotting.WIDTH * 0.85 / 9 > 0.9 * size


def test_scores_of_variants_stand_beside_the_plain_method(tmp_path):
    for number, changes in enumerate(({}, {"recent_tokens": 15}, {"sink_tokens": 1}, {"method": "sink_attention"})):
        (folder := tmp_path / str(number)).mkdir()
        run = results(**changes)
        (folder / "results.json").write_text(json.dumps(run))
        (folder / "scores.json").write_text(json.dumps(scores(run["method"])))
    (found,) = collecting.collect(tmp_path).scores
    ordered = sorted(found, key=lambda score: (collecting.rank(score.method), score.variant))
    for panel in plotting.scores(ordered).panels:
        assert [(curve.label, len(curve.points)) for curve in panel.curves] == [
            ("KV compression", 1),
            (plotting.VARIANTS, 2),
            ("sink attention", 1),
        ]
        places = [point[0] for curve in panel.curves for point in curve.points]
        assert places == sorted(set(places))
