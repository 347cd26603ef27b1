"""Spans chosen by what their tokens tell, and the equal chunks to compare them with.

Both return sorted, disjoint, inclusive `(first, last)` pairs that remove exactly round(ratio · num_tokens) entries. A
span of n tokens becomes `cr_tokens` entries, so it removes n − cr_tokens. Knows numbers only: where they come from is
`information`.
"""

from collections.abc import Sequence

import numpy as np

from kv_compression.spans import Span
from kv_compression.visibility import check_ratio


def most_removable(num_tokens: int, max_span_length: int, cr_tokens: int = 1) -> int:
    """How many cache entries spans of at most `max_span_length` can remove from `num_tokens`."""
    full, rest = divmod(num_tokens, max_span_length)
    return full * (max_span_length - cr_tokens) + max(rest - cr_tokens, 0)


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
    """The spans in [first, last) whose tokens carry the least information in sum, of all that remove the exact share.

    `information` is a finite number per token of the block. Where `unit_starts` says which tokens begin a unit (a
    phrase, a sentence), a span that begins or ends inside one is taken only as far as the exact share demands: a cut
    weighs more than all information. The block's own ends cut nothing. The same input gives the same spans. Raises
    ValueError, naming the bound, if so many entries cannot be removed. (This project.)
    """
    information = np.asarray(information, dtype=np.float64)
    if not np.isfinite(information).all():
        raise ValueError("every token's information must be a finite number")
    num_tokens = len(information)
    last = num_tokens if last is None else last
    to_remove = _to_remove(num_tokens, ratio, max_span_length, cr_tokens, first, last)
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

    # cheapest[kept, end]: the least cost of the first `end` tokens that leaves `kept` entries of them. A token that
    # stays comes from (kept − 1, end − 1), a span of n tokens from (kept − cr_tokens, end − n): a row depends on rows
    # above alone, and all its ends are found at once.
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
    """Equal chunks with equal gaps behind them, from `first` on, that remove the exact share; equal is within one.

    There are as many as gives them the paper's average length, (cr_tokens + 1 + max_span_length)/2, but fewer and
    longer ones where these would not fit, so that near the bound no gap is left. Raises ValueError as
    `cheapest_spans` does. (This project.)
    """
    last = num_tokens if last is None else last
    to_remove = _to_remove(num_tokens, ratio, max_span_length, cr_tokens, first, last)
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
    """The minimum of every run of `width` neighbours: minima of ever wider windows, two of which cover a run."""
    covered = 1
    while covered < width:
        step = min(covered, width - covered)
        values, covered = np.minimum(values[:-step], values[step:]), covered + step
    return values


def _to_remove(num_tokens: int, ratio: float, max_span_length: int, cr_tokens: int, first: int, last: int) -> int:
    """round(ratio · num_tokens), or ValueError if spans in [first, last) cannot remove as many."""
    check_ratio(ratio)
    if cr_tokens < 1:
        raise ValueError(f"a span leaves at least 1 entry, so cr_tokens must be at least 1, got {cr_tokens}")
    if max_span_length <= cr_tokens:
        raise ValueError(
            f"spans have at least {cr_tokens + 1} tokens, so max_span_length must be at least {cr_tokens + 1}, "
            f"got {max_span_length}"
        )
    if not 0 <= first <= last <= num_tokens:
        raise ValueError(f"[{first}, {last}) is not a part of {num_tokens} tokens")
    to_remove = round(ratio * num_tokens)
    bound = most_removable(last - first, max_span_length, cr_tokens)
    if to_remove > bound:
        raise ValueError(
            f"ratio {ratio} asks to remove {to_remove} of {num_tokens} tokens, but spans of at most {max_span_length} "
            f"in {last - first} of them can remove {bound}: lower the ratio to {bound / num_tokens:.3f} or allow "
            "longer spans"
        )
    return to_remove
