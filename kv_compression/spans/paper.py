"""The paper's span sampler, on the words of a line."""

from kv_compression.methods.ratio import check_ratio
from kv_compression.spans.exact import Span, as_generator

SHORTEST_PAPER_LINE = 30  # words; the published sampler leaves shorter lines alone


def paper_spans(num_words: int, ratio: float, max_span_length: int, rng) -> list[Span]:
    """Spans on the `num_words` words of one line; none if it has fewer than 30.

    With m = max_span_length and a = (2 + m)/2 the target is T = int(ratio · a/(a − 1) · num_words) words. Spans of
    2 … m words are drawn at random and kept if they do not overlap an earlier one, until T words are covered or
    3·(T // a) draws are made. Rejected draws and the cap leave high ratios far out of reach: see `exact_spans`. `rng`
    is what `as_generator` takes. ValueError for a ratio outside [0, 1) or spans of one word. (Paper, section 4.1, and
    the code published with it.)
    """
    check_ratio(ratio)
    if max_span_length < 2:
        raise ValueError(f"spans have at least 2 tokens, so max_span_length must be at least 2, got {max_span_length}")
    starts = num_words - max_span_length
    if num_words < SHORTEST_PAPER_LINE or starts < 1:
        return []
    average = (2 + max_span_length) / 2
    target = int(ratio * average / (average - 1) * num_words)
    if target == 0:
        return []
    rng = as_generator(rng)
    draws = max(int(3 * (target // average)), 1)  # the cap is checked after a draw, so there is always one
    firsts = rng.integers(0, starts, size=draws)
    lasts = firsts + rng.integers(1, max_span_length, size=draws)
    kept, covered, taken = [], 0, bytearray(num_words)
    for first, last in zip(firsts.tolist(), lasts.tolist()):
        if not any(taken[first : last + 1]):
            taken[first : last + 1] = b"\1" * (last - first + 1)
            kept.append((first, last))
            covered += last - first + 1
            if covered >= target:
                break
    return sorted(kept)
