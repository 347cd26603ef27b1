"""Which spans to compress: samplers that return sorted, disjoint, inclusive `(first, last)` pairs.

Knows numbers only: how long a text is, the ratio asked for, the longest span allowed.
"""

import random

import numpy as np

from kv_compression.methods.ratio import entries_to_remove

Span = tuple[int, int]


def as_generator(rng) -> np.random.Generator:
    """A numpy generator from one, from a `random.Random` (which advances), or from a seed (an int or several)."""
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
    """Spans of at most max_span_length tokens at random places that remove exactly round(ratio · num_tokens) entries.

    A span of n tokens removes n − cr_tokens, at least 1; spans lie in [first, last), by default everywhere. Lengths are
    drawn as in the paper (uniform, as far as the exact sum leaves a choice), gaps uniformly. Raises ValueError, naming
    the bound, if so many cannot be removed. (This project.)
    """
    to_remove = entries_to_remove(num_tokens, ratio, max_span_length, cr_tokens, first, last)
    if to_remove == 0:
        return []
    region = (num_tokens if last is None else last) - first
    rng = as_generator(rng)
    longest = max_span_length - cr_tokens  # what one span can remove

    # As many spans as uniform lengths would take, within what leaves room for them all.
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

    # Choosing which of (spans and single tokens, in a row) are the spans makes all gaps equally likely.
    outside = region - to_remove - num_spans * cr_tokens
    places = np.sort(rng.choice(outside + num_spans, size=num_spans, replace=False))
    spans, shift = [], first
    for place, removal in zip(places.tolist(), removals):
        length = removal + cr_tokens
        spans.append((place + shift, place + shift + length - 1))
        shift += length - 1
    return spans
