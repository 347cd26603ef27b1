"""Random spans that remove exactly the stated share, and how much spans can remove.

All samplers here return sorted, disjoint, inclusive `(first, last)` pairs.
"""

import random

import numpy as np

from kv_compression.methods.ratio import check_ratio, share_to_remove

SPAN_SAMPLERS = ("random", "fixed", "self_information")
UNITS = ("token", "phrase", "sentence")  # for self_information

Span = tuple[int, int]


def as_generator(rng) -> np.random.Generator:
    """`rng` as a numpy generator: one already, a `random.Random` (which advances), or a seed (an int or several)."""
    if isinstance(rng, random.Random):
        return np.random.default_rng(rng.getrandbits(64))
    return np.random.default_rng(rng)


def most_removable(num_tokens: int, max_span_length: int, cr_tokens: int = 1) -> int:
    """How many cache entries spans of at most `max_span_length`, each kept in `cr_tokens`, can remove."""
    full, rest = divmod(num_tokens, max_span_length)
    return full * (max_span_length - cr_tokens) + max(rest - cr_tokens, 0)


def widest_window(num_tokens: int, ratio: float, max_span_length: int, cr_tokens: int = 1, first: int = 0) -> int:
    """How many of the last tokens can stay outside spans from `first` on that remove the exact share; at least 0."""
    to_remove = share_to_remove(num_tokens, ratio)
    num_spans = -(-to_remove // (max_span_length - cr_tokens))
    return max(num_tokens - first - to_remove - num_spans * cr_tokens, 0)


def entries_to_remove(
    num_tokens: int, ratio: float, max_span_length: int, cr_tokens: int = 1, first: int = 0, last: int | None = None
) -> int:
    """round(ratio · num_tokens). ValueError, naming the bound, if spans in [first, last) cannot remove that many."""
    check_ratio(ratio)
    last = num_tokens if last is None else last
    if cr_tokens < 1:
        raise ValueError(f"a span leaves at least 1 entry, so cr_tokens must be at least 1, got {cr_tokens}")
    if max_span_length <= cr_tokens:
        raise ValueError(
            f"spans have at least {cr_tokens + 1} tokens, so max_span_length must be at least {cr_tokens + 1}, "
            f"got {max_span_length}"
        )
    if not 0 <= first <= last <= num_tokens:
        raise ValueError(f"[{first}, {last}) is not a part of {num_tokens} tokens")
    to_remove = share_to_remove(num_tokens, ratio)
    bound = most_removable(last - first, max_span_length, cr_tokens)
    if to_remove > bound:
        where = "" if last - first == num_tokens else f"in {last - first} of them "
        raise ValueError(
            f"ratio {ratio} asks to remove {to_remove} of {num_tokens} tokens, but spans of at most {max_span_length} "
            f"{where}can remove {bound}: lower the ratio to {bound / num_tokens:.3f} or allow longer spans"
        )
    return to_remove


def exact_spans(
    num_tokens: int,
    ratio: float,
    max_span_length: int,
    rng,
    *,
    cr_tokens: int = 1,
    first: int = 0,
    last: int | None = None,
) -> list[Span]:
    """Spans of at most `max_span_length` tokens at random places that remove exactly round(ratio · num_tokens) entries.

    A span of n tokens removes n − cr_tokens entries, at least 1. Spans lie in [first, last), by default anywhere.
    Lengths are uniform as in the paper, as far as the exact sum leaves a choice; gaps are uniform. `rng` is what
    `as_generator` takes. ValueError, naming the bound, if spans cannot remove that many. (This project.)
    """
    to_remove = entries_to_remove(num_tokens, ratio, max_span_length, cr_tokens, first, last)
    if to_remove == 0:
        return []
    region = (num_tokens if last is None else last) - first
    rng = as_generator(rng)
    longest = max_span_length - cr_tokens  # what one span can remove

    # As many spans as uniform lengths would take, as long as there is room for all of them.
    needed = -(-to_remove // longest)
    drawn = rng.integers(1, longest + 1, size=to_remove).cumsum()
    num_spans = int(np.searchsorted(drawn, to_remove)) + 1
    num_spans = min(max(num_spans, needed), (region - to_remove) // cr_tokens)

    removals, left = [], to_remove
    for spans_left in range(num_spans - 1, -1, -1):
        lowest = max(1, left - spans_left * longest)
        highest = min(longest, left - spans_left)
        removals.append(int(rng.integers(lowest, highest + 1)))
        left -= removals[-1]
    rng.shuffle(removals)  # the bounds above depend on the order of drawing

    # Line up spans and single tokens, and choose which of them are the spans: then all gaps are equally likely.
    outside = region - to_remove - num_spans * cr_tokens
    places = np.sort(rng.choice(outside + num_spans, size=num_spans, replace=False))
    spans, shift = [], first
    for place, removal in zip(places.tolist(), removals):
        length = removal + cr_tokens
        spans.append((place + shift, place + shift + length - 1))
        shift += length - 1
    return spans
