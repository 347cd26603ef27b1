"""Random blocks for property tests: tokens with spans that touch, begin before the block or end behind it."""

from hypothesis import strategies as st

CL, CR = 1, 2
TEXT = st.integers(3, 9)


@st.composite
def blocks(draw, max_pieces: int = 5) -> list[int]:
    """Token ids of one block; every block has at least one token."""
    ids = []
    if draw(st.booleans()):  # begins inside a span
        ids += draw(st.lists(TEXT, max_size=4)) + [CR]
    for _ in range(draw(st.integers(0, max_pieces))):
        ids += draw(st.lists(TEXT, max_size=3))  # nothing between two spans: they touch
        ids += [CL, *draw(st.lists(TEXT, min_size=1, max_size=5)), CR]
    ids += draw(st.lists(TEXT, max_size=4))
    if draw(st.booleans()):  # ends inside a span
        ids += [CL, *draw(st.lists(TEXT, max_size=4))]
    return ids or [draw(TEXT)]


@st.composite
def batches(draw) -> list[list[int]]:
    """Blocks of one length: the shortest of them is the measure, the rest is cut, in the middle of a span too."""
    rows = draw(st.lists(blocks(), min_size=1, max_size=4))
    length = min(map(len, rows))
    return [row[:length] for row in rows]
