"""Random blocks for property tests: tokens with spans that touch, begin before the block or end behind it."""

from hypothesis import strategies as st

from kv_compression.methods.kv_compression import KVCompression

CL, CR = 1, 2
TEXT = st.integers(3, 9)


@st.composite
def blocks(draw, max_pieces: int = 5, most_crs: int = 1) -> list[int]:
    """Token ids of one block; every block has at least one token."""
    ids = []
    in_row = st.integers(1, most_crs)
    if draw(st.booleans()):  # begins inside a span
        ids += draw(st.lists(TEXT, max_size=4)) + [CR] * draw(in_row)
    for _ in range(draw(st.integers(0, max_pieces))):
        ids += draw(st.lists(TEXT, max_size=3))  # nothing between two spans: they touch
        ids += [CL, *draw(st.lists(TEXT, min_size=1, max_size=5)), *[CR] * draw(in_row)]
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


@st.composite
def variants(draw) -> tuple[KVCompression, dict, list[int]]:
    """KV compression with options, the same options as the restated rule names them, and a block for it."""
    sinks, crs, recent = draw(st.integers(0, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 6))
    context = draw(st.booleans())
    ids = draw(blocks(most_crs=crs + draw(st.integers(0, 1))))
    visibility = "context" if context else "span"
    rule = KVCompression(CL, CR, sink_tokens=sinks, cr_tokens=crs, cr_visibility=visibility, recent_tokens=recent)
    return rule, {"sinks": sinks, "cr_tokens": crs, "context": context, "recent": recent}, ids
