"""Random spans that remove exactly the stated share, and how much spans can remove.

All samplers here return sorted, disjoint, inclusive `(first, last)` pairs.
"""

import random

import numpy as np

from kv_compression.methods.ratio import entries_to_remove

Span = tuple[int, int]


def as_generator(rng) -> np.random.Generator:
    """`rng` as a numpy generator: one already, a `random.Random` (which advances), or a seed (an int or several)."""
    if isinstance(rng, random.Random):
        return np.random.default_rng(rng.getrandbits(64))
    return np.random.default_rng(rng)


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
