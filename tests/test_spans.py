import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_compression.methods import ratio as ratios
from kv_compression.spans import exact, paper

SEEDS = st.integers(0, 2**32)


def check_spans(found, num_tokens, longest):
    """Sorted, disjoint, inside the text, of 2 … longest tokens."""
    last_before = -1
    for first, last in found:
        assert last_before < first < last < num_tokens
        assert last - first + 1 <= longest
        last_before = last


def removed(found) -> int:
    return sum(last - first for first, last in found)


@given(st.integers(1, 400), st.integers(2, 40), SEEDS, st.data())
def test_exact_spans_remove_exactly_the_share(num_tokens, longest, seed, data):
    bound = ratios.most_removable(num_tokens, longest)
    to_remove = data.draw(st.integers(0, bound))
    ratio = to_remove / num_tokens
    found = exact.exact_spans(num_tokens, ratio, longest, np.random.default_rng(seed))
    check_spans(found, num_tokens, longest)
    assert removed(found) == round(ratio * num_tokens) == to_remove


@given(st.integers(1, 300), st.integers(1, 4), st.integers(1, 20), SEEDS, st.data())
def test_exact_spans_in_a_part_of_the_block(num_tokens, crs, extra, seed, data):
    longest = crs + extra
    first = data.draw(st.integers(0, num_tokens))
    last = data.draw(st.integers(first, num_tokens))
    to_remove = data.draw(st.integers(0, ratios.most_removable(last - first, longest, crs)))
    found = exact.exact_spans(num_tokens, to_remove / num_tokens, longest, seed, cr_tokens=crs, first=first, last=last)
    assert sum(end - begin + 1 - crs for begin, end in found) == to_remove
    assert all(first <= begin and end < last and crs < end - begin + 1 <= longest for begin, end in found)
    assert all(one[1] < other[0] for one, other in zip(found, found[1:]))


@given(st.integers(1, 300), st.floats(0, 0.95), st.integers(1, 3), st.integers(1, 30), st.integers(0, 5))
def test_the_widest_window_is_the_last_that_leaves_room(num_tokens, ratio, crs, extra, first):
    window, longest = ratios.widest_window(num_tokens, ratio, crs + extra, crs, first), crs + extra
    room = [
        wide
        for wide in range(num_tokens - first + 1)
        if ratios.most_removable(num_tokens - first - wide, longest, crs) >= round(ratio * num_tokens)
    ]
    assert window == max(room, default=0)


@given(st.integers(2, 400), st.integers(2, 40))
def test_more_than_the_bound_is_refused_with_the_bound(num_tokens, longest):
    bound = num_tokens - -(-num_tokens // longest)
    ratio = (bound + 1) / num_tokens
    if ratio < 1:
        with pytest.raises(ValueError, match=f"can remove {bound}:"):
            exact.exact_spans(num_tokens, ratio, longest, 0)


def test_exact_spans_lie_anywhere():
    covered = np.zeros(64)
    for seed in range(2000):
        for first, last in exact.exact_spans(64, 0.4, 8, seed):
            covered[first : last + 1] += 1
    assert covered.min() > 0  # fewer spans reach the ends, all places between are alike
    assert covered[8:-8].min() > 0.85 * covered[8:-8].max()
    lengths = [b - a + 1 for seed in range(500) for a, b in exact.exact_spans(256, 0.3, 25, seed)]
    assert set(lengths) == set(range(2, 26))


def slow_paper_spans(n, ratio, m, draws):
    """The published sampler step by step, on given draws (l, length − 1)."""
    a = (2 + m) / 2
    target = int(ratio * a / (a - 1) * n)
    kept, covered, count = [], 0, 0
    while covered < target:
        first, extra = next(draws)
        last = first + extra
        if all(last < other_first or other_last < first for other_first, other_last in kept):
            kept.append((first, last))
            covered += last - first + 1
        count += 1
        if count >= 3 * (target // a):
            break
    return sorted(kept)


@given(st.integers(30, 300), st.floats(0, 0.99), st.integers(2, 29), SEEDS)
def test_paper_spans_are_the_published_sampler(num_words, ratio, longest, seed):
    found = paper.paper_spans(num_words, ratio, longest, np.random.default_rng(seed))
    check_spans(found, num_words, longest)
    a = (2 + longest) / 2
    target = int(ratio * a / (a - 1) * num_words)
    size = max(int(3 * (target // a)), 1)
    rng = np.random.default_rng(seed)
    firsts = rng.integers(0, num_words - longest, size=size)
    lengths = rng.integers(1, longest, size=size)
    assert found == slow_paper_spans(num_words, ratio, longest, zip(firsts, lengths))


def test_paper_spans_draw_the_published_range():
    found = [span for seed in range(3000) for span in paper.paper_spans(40, 0.3, 10, seed)]
    assert {first for first, _ in found} == set(range(30))  # 0 … n − m − 1
    assert {last - first for first, last in found} == set(range(1, 10))  # 1 … m − 1


@pytest.mark.parametrize(("num_words", "longest"), [(29, 5), (0, 5), (30, 30), (30, 40)])
def test_paper_spans_leave_short_lines_alone(num_words, longest):
    assert paper.paper_spans(num_words, 0.9, longest, 0) == []


def test_paper_spans_at_a_nominal_nine_tenths_remove_about_half():
    lines = [(n, paper.paper_spans(n, 0.9, 25, seed)) for seed, n in enumerate([60, 90, 120, 150] * 50)]
    share = sum(removed(found) for _, found in lines) / sum(n for n, _ in lines)
    assert 0.4 < share < 0.65


@pytest.mark.parametrize("sampler", [paper.paper_spans, exact.exact_spans])
def test_generators_seeds_and_bad_input(sampler):
    assert sampler(100, 0.5, 10, 7) == sampler(100, 0.5, 10, 7) != sampler(100, 0.5, 10, 8)
    assert sampler(100, 0.5, 10, random.Random(1)) == sampler(100, 0.5, 10, random.Random(1))
    rng = np.random.default_rng(0)
    assert sampler(100, 0.5, 10, rng) != sampler(100, 0.5, 10, rng)  # a generator moves on
    assert sampler(100, 0, 10, 0) == []
    for bad in (-0.1, 1, float("nan")):
        with pytest.raises(ValueError, match="ratio"):
            sampler(100, bad, 10, 0)
    with pytest.raises(ValueError, match="at least 2"):
        sampler(100, 0.5, 1, 0)
