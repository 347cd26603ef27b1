import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_compression.methods.ratio import most_removable
from kv_compression.spans.chosen import cheapest_spans, fixed_spans
from tests.test_spans import check_spans


def all_span_sets(first, last, longest, cr_tokens):
    """Every set of disjoint spans of cr_tokens + 1 … longest tokens in [first, last)."""
    yield []
    for begin in range(first, last):
        for end in range(begin + cr_tokens, min(begin + longest, last)):
            for rest in all_span_sets(end + 1, last, longest, cr_tokens):
                yield [(begin, end), *rest]


def removed(spans, cr_tokens=1) -> int:
    return sum(last - first + 1 - cr_tokens for first, last in spans)


def carried(spans, information) -> float:
    return sum(sum(information[first : last + 1]) for first, last in spans)


def cuts(spans, unit_starts) -> int:
    """How often a span begins or ends inside a unit."""
    begins = sum(first > 0 and not unit_starts[first] for first, _ in spans)
    return begins + sum(last + 1 < len(unit_starts) and not unit_starts[last + 1] for _, last in spans)


@st.composite
def small_problems(draw):
    num_tokens = draw(st.integers(1, 9))
    cr_tokens = draw(st.integers(1, 3))
    longest = draw(st.integers(cr_tokens + 1, 7))
    first = draw(st.integers(0, num_tokens))
    last = draw(st.integers(first, num_tokens))
    to_remove = draw(st.integers(0, most_removable(last - first, longest, cr_tokens)))
    information = draw(st.lists(st.floats(-2, 20), min_size=num_tokens, max_size=num_tokens))
    unit_starts = draw(st.none() | st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    return information, to_remove, longest, cr_tokens, first, last, unit_starts


@given(small_problems())
def test_no_spans_are_cheaper_nor_cut_fewer_units(problem):
    information, to_remove, longest, cr_tokens, first, last, unit_starts = problem
    found = cheapest_spans(
        information,
        to_remove / len(information),
        longest,
        cr_tokens=cr_tokens,
        first=first,
        last=last,
        unit_starts=unit_starts,
    )
    exact = [
        spans for spans in all_span_sets(first, last, longest, cr_tokens) if removed(spans, cr_tokens) == to_remove
    ]
    assert found in exact
    unit_starts = unit_starts or [True] * len(information)
    fewest, least = min((cuts(spans, unit_starts), carried(spans, information)) for spans in exact)
    assert cuts(found, unit_starts) == fewest
    assert carried(found, information) == pytest.approx(least, abs=1e-6)


@given(st.integers(0, 9), st.integers(1, 3), st.integers(1, 6))
def test_the_bound_is_what_the_best_spans_remove(num_tokens, cr_tokens, extra):
    longest = cr_tokens + extra
    best = max(removed(spans, cr_tokens) for spans in all_span_sets(0, num_tokens, longest, cr_tokens))
    assert most_removable(num_tokens, longest, cr_tokens) == best


@given(st.integers(1, 300), st.integers(2, 40), st.integers(0, 2**32), st.data())
def test_cheapest_spans_remove_exactly_the_share(num_tokens, longest, seed, data):
    to_remove = data.draw(st.integers(0, most_removable(num_tokens, longest)))
    rng = np.random.default_rng(seed)
    information = rng.exponential(3, num_tokens)
    unit_starts = rng.random(num_tokens) < 0.3
    found = cheapest_spans(information, to_remove / num_tokens, longest, unit_starts=unit_starts)
    check_spans(found, num_tokens, longest)
    assert removed(found) == to_remove
    assert found == cheapest_spans(information.tolist(), to_remove / num_tokens, longest, unit_starts=list(unit_starts))


def test_the_least_information_is_compressed_first():
    information = [9.0] * 20
    information[3:7] = [2.0] * 4
    information[12:15] = [1.0] * 3
    assert cheapest_spans(information, 0.1, 10) == [(12, 14)]
    assert cheapest_spans(information, 0.25, 10) == [(3, 6), (12, 14)]
    assert cheapest_spans(information, 0.15, 10, first=1, last=12) == [(3, 6)]
    assert cheapest_spans([1.0] * 20, 0.1, 10) == [(0, 2)]  # of equals the first


def test_units_are_cut_only_for_the_exact_share():
    information = [1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 5.0, 2.0, 2.0, 2.0]
    starts = [number in (0, 3, 7) for number in range(10)]
    assert cheapest_spans(information, 0.3, 10, unit_starts=starts) == [(3, 6)]  # three removed without a cut
    assert cheapest_spans(information, 0.3, 10) == [(0, 2), (7, 8)]
    assert cheapest_spans(information, 0.2, 10, unit_starts=starts) == [(0, 2)]
    assert cheapest_spans(information, 0.1, 10, unit_starts=starts) == [(0, 1)]  # no unit is so short: one cut
    begun_before = [False, False, True, True, True]  # the block's first token is inside a unit
    assert cheapest_spans([2.0, 2.0, 1.0, 9.0, 1.0], 0.2, 5, unit_starts=begun_before) == [(0, 1)]


@given(st.integers(1, 300), st.integers(1, 5), st.integers(1, 40), st.data())
def test_fixed_spans_are_equal_and_evenly_spaced(num_tokens, cr_tokens, extra, data):
    longest = cr_tokens + extra
    first = data.draw(st.integers(0, num_tokens))
    last = data.draw(st.integers(first, num_tokens))
    to_remove = data.draw(st.integers(0, most_removable(last - first, longest, cr_tokens)))
    found = fixed_spans(num_tokens, to_remove / num_tokens, longest, cr_tokens=cr_tokens, first=first, last=last)
    assert removed(found, cr_tokens) == to_remove
    if found:
        lengths = [end - begin + 1 for begin, end in found]
        ends = [begin for begin, _ in found[1:]] + [last]
        gaps = [after - end - 1 for (_, end), after in zip(found, ends)]
        assert cr_tokens < min(lengths) <= max(lengths) <= min(longest, min(lengths) + 1)
        assert 0 <= min(gaps) <= max(gaps) <= min(gaps) + 1
        assert found[0][0] == first


def test_fixed_spans_have_the_papers_length_where_they_fit():
    quarter = fixed_spans(256, 0.25, 25)
    assert {last - first + 1 for first, last in quarter} <= {13, 14}
    assert [first for first, _ in quarter] == pytest.approx(np.arange(5) * 256 / 5, abs=2)
    full = fixed_spans(256, 0.95, 25)
    assert [first for first, _ in full[1:]] == [last + 1 for _, last in full[:-1]]  # no gap is left
    assert fixed_spans(100, 0.01, 25) == [(0, 1)]


@pytest.mark.parametrize(
    "spans", [lambda n, *rest, **kind: cheapest_spans([1.0] * n, *rest, **kind), fixed_spans], ids=["cheapest", "fixed"]
)
def test_what_cannot_be_is_refused(spans):
    with pytest.raises(
        ValueError, match=r"asks to remove 98 of 100 tokens, .* can remove 90: lower the ratio to 0.900"
    ):
        spans(100, 0.98, 10)
    with pytest.raises(ValueError, match="in 50 of them can remove 45"):
        spans(100, 0.46, 10, first=25, last=75)
    with pytest.raises(ValueError, match="can remove 80"):
        spans(100, 0.81, 10, cr_tokens=2)
    with pytest.raises(ValueError, match="ratio must be"):
        spans(100, 1.0, 10)
    with pytest.raises(ValueError, match="at least 3 tokens"):
        spans(100, 0.1, 2, cr_tokens=2)
    with pytest.raises(ValueError, match="cr_tokens must be at least 1"):
        spans(100, 0.1, 10, cr_tokens=0)
    for first, last in itertools.permutations((-1, 20, 101), 2):
        with pytest.raises(ValueError, match="is not a part of 100 tokens"):
            spans(100, 0.1, 10, first=first, last=last)
    assert spans(100, 0.0, 10) == spans(100, 0.0, 10, first=50, last=50) == []
    assert spans(0, 0.5, 10) == []


def test_information_and_units_must_fit_the_tokens():
    for bad in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="finite"):
            cheapest_spans([1.0, bad, 1.0], 0.4, 3)
    with pytest.raises(ValueError, match="2 unit starts for 3 tokens"):
        cheapest_spans([1.0, 2.0, 3.0], 0.4, 3, unit_starts=[True, False])
