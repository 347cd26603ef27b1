"""What a compression ratio asks for, as arithmetic: no torch here."""


def share_to_remove(num_tokens: int, ratio: float) -> int:
    """How many entries leave the cache at a ratio: round(ratio · num_tokens). (Protocol `matched`, this project.)"""
    return round(ratio * num_tokens)


def check_ratio(ratio: float) -> float:
    """Return `ratio`, or raise ValueError unless 0 ≤ ratio < 1."""
    if not 0 <= ratio < 1:
        raise ValueError(f"the compression ratio must be at least 0 and below 1, got {ratio}")
    return ratio


def most_removable(num_tokens: int, max_span_length: int, cr_tokens: int = 1) -> int:
    """How many entries spans of at most `max_span_length` tokens, each leaving `cr_tokens` entries, can remove."""
    full, rest = divmod(num_tokens, max_span_length)
    return full * (max_span_length - cr_tokens) + max(rest - cr_tokens, 0)


def widest_window(num_tokens: int, ratio: float, max_span_length: int, cr_tokens: int = 1, first: int = 0) -> int:
    """How many of the last tokens can stay out of spans when the exact share leaves the text from `first` on (≥ 0)."""
    to_remove = share_to_remove(num_tokens, ratio)
    num_spans = -(-to_remove // (max_span_length - cr_tokens))
    return max(num_tokens - first - to_remove - num_spans * cr_tokens, 0)


def entries_to_remove(
    num_tokens: int, ratio: float, max_span_length: int, cr_tokens: int = 1, first: int = 0, last: int | None = None
) -> int:
    """round(ratio · num_tokens); ValueError, naming the bound, if spans in [first, last) cannot remove that many."""
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


def shortest_spans(
    num_tokens: int, ratio: float, max_span_length: int, cr_tokens: int = 1, first: int = 0, last: int | None = None
) -> int:
    """The least length that spans in [first, last) may be limited to and still remove round(ratio · num_tokens).

    ValueError, naming the bound, if even `max_span_length` is too short. (This project.)
    """
    to_remove = entries_to_remove(num_tokens, ratio, max_span_length, cr_tokens, first, last)
    region = (num_tokens if last is None else last) - first
    return next(
        length
        for length in range(cr_tokens + 1, max_span_length + 1)
        if most_removable(region, length, cr_tokens) >= to_remove
    )
