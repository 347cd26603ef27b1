"""Spans chosen by the information in their tokens, and equal chunks to compare them with.

Both samplers return sorted, disjoint, inclusive `(first, last)` pairs that remove exactly round(ratio · num_tokens)
entries. A span of n tokens becomes `cr_tokens` entries, so it removes n − cr_tokens.
"""

from collections.abc import Sequence

import numpy as np

from kv_compression.methods.ratio import entries_to_remove
from kv_compression.spans.exact import Span


def cheapest_spans(
    information,
    ratio: float,
    max_span_length: int,
    *,
    cr_tokens: int = 1,
    first: int = 0,
    last: int | None = None,
    unit_starts: Sequence[bool] | None = None,
) -> list[Span]:
    """Of all spans in [first, last) that remove the exact share, those with the least information in sum.

    `information` is a finite number per token of the block. If `unit_starts` says which tokens begin a unit (a phrase,
    a sentence), spans cut units only as often as the exact share demands: a cut weighs more than all information. The
    ends of the block cut nothing. The result is deterministic. ValueError, naming the bound, if spans cannot remove
    that many entries. (This project.)
    """
    information = np.asarray(information, dtype=np.float64)
    if not np.isfinite(information).all():
        raise ValueError("every token's information must be a finite number")
    num_tokens = len(information)
    last = num_tokens if last is None else last
    to_remove = entries_to_remove(num_tokens, ratio, max_span_length, cr_tokens, first, last)
    cuts = np.zeros(num_tokens + 1)
    if unit_starts is not None:
        if len(unit_starts) != num_tokens:
            raise ValueError(f"{len(unit_starts)} unit starts for {num_tokens} tokens")
        cuts[:-1] = ~np.asarray(unit_starts, dtype=bool)
        cuts[0] = 0
    cuts = cuts[first : last + 1] * (1 + np.abs(information).sum())

    # A span of the tokens i … j − 1 costs opening[i] + closing[j].
    before = np.concatenate([[0], information[first:last].cumsum()])
    opening, closing = cuts - before, cuts + before

    # cheapest[kept, end]: the least cost at which the first `end` tokens leave `kept` entries. A token that stays comes
    # from (kept − 1, end − 1), a span of n tokens from (kept − cr_tokens, end − n): a row depends only on earlier rows,
    # so all its ends are computed at once.
    region = last - first
    cheapest = np.full((region - to_remove + 1, region + 1), np.inf)
    cheapest[0, 0] = 0
    for kept in range(1, len(cheapest)):
        cheapest[kept, 1:] = cheapest[kept - 1, :-1]
        if kept >= cr_tokens:
            opened = np.concatenate([np.full(max_span_length, np.inf), cheapest[kept - cr_tokens] + opening])
            best = _window_minima(opened, max_span_length - cr_tokens)[: region + 1]
            np.minimum(cheapest[kept], best + closing, out=cheapest[kept])

    spans, kept, end = [], region - to_remove, region
    while end:
        if kept and cheapest[kept, end] == cheapest[kept - 1, end - 1]:
            kept, end = kept - 1, end - 1
            continue
        kept, earliest = kept - cr_tokens, max(end - max_span_length, 0)
        begins = slice(earliest, end - cr_tokens)
        begin = earliest + int(np.argmin(cheapest[kept, begins] + opening[begins]))
        spans.append((first + begin, first + end - 1))
        end = begin
    return spans[::-1]


def fixed_spans(
    num_tokens: int,
    ratio: float,
    max_span_length: int,
    *,
    cr_tokens: int = 1,
    first: int = 0,
    last: int | None = None,
) -> list[Span]:
    """Equal chunks from `first` on, each followed by an equal gap, that remove the exact share (equal within one).

    Chunks have the paper's average length, (cr_tokens + 1 + max_span_length)/2. If those do not fit, there are fewer
    and longer ones: near the bound no gap is left. ValueError as in `cheapest_spans`. (This project.)
    """
    last = num_tokens if last is None else last
    to_remove = entries_to_remove(num_tokens, ratio, max_span_length, cr_tokens, first, last)
    if to_remove == 0:
        return []
    longest = max_span_length - cr_tokens  # what one span can remove
    room = last - first - to_remove
    wanted = round(to_remove / ((1 + longest) / 2))
    num_spans = min(max(wanted, -(-to_remove // longest)), to_remove, room // cr_tokens)
    gaps = room - num_spans * cr_tokens
    spans = []
    for index in range(num_spans):
        removed, removed_next = index * to_remove // num_spans, (index + 1) * to_remove // num_spans
        begin = first + index * cr_tokens + removed + index * gaps // num_spans
        spans.append((begin, begin + removed_next - removed + cr_tokens - 1))
    return spans


def _window_minima(values: np.ndarray, width: int) -> np.ndarray:
    """The minimum of every `width` neighbours, from minima of ever wider windows, two of which cover the neighbours."""
    covered = 1
    while covered < width:
        step = min(covered, width - covered)
        values, covered = np.minimum(values[:-step], values[step:]), covered + step
    return values
