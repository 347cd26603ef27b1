"""The rules again, restated token by token in plain Python: slow, obvious, and what the fast ones are held to."""

from math import floor


def spans_of(ids: list[int], cl: int, cr: int) -> list[tuple[int, int, int]]:
    """Spans as (first token or <CL>, index of the <CR>, whether there is a <CL>) in a block's order.

    A <CR> without a <CL> closes a span from the block's first token on; a later one without a <CL> an empty span.
    """
    spans, opened, seen_sentinel = [], None, False
    for index, token in enumerate(ids):
        if token == cl:
            opened, seen_sentinel = index, True
        elif token == cr:
            if opened is not None:
                spans.append((opened, index, True))
            else:
                spans.append((index if seen_sentinel else 0, index, False))
            opened, seen_sentinel = None, True
    return spans


def visible(ids: list[int], q: int, k: int, cl: int, cr: int) -> bool:
    """Whether query q sees key k under KV compression."""
    if k > q:
        return False
    if k == q:
        return True
    if ids[q] == cl:
        return False
    spans = spans_of(ids, cl, cr)
    if ids[q] == cr:
        return any(last == q and first <= k for first, last, _ in spans)
    if ids[k] == cl:
        return False
    if ids[k] == cr:
        return True
    of_key = [span for span in spans if span[0] <= k < span[1]]
    of_query = [span for span in spans if span[0] <= q < span[1]]
    return not of_key or of_key == of_query


def kv_mask(ids: list[int], cl: int, cr: int) -> list[list[bool]]:
    return [[visible(ids, q, k, cl, cr) for k in range(len(ids))] for q in range(len(ids))]


def local_mask(length: int, ratio: float) -> list[list[bool]]:
    return [[floor(q * ratio) <= k <= q for k in range(length)] for q in range(length)]


def positions(ids: list[int], cl: int, cr: int) -> list[int]:
    out, count = [], 0
    for index, token in enumerate(ids):
        if token in (cl, cr):
            out.append(out[index - 1] if index else 0)
        else:
            out.append(count)
            count += 1
    return out


def targets(ids: list[int], cl: int, cr: int) -> list[int]:
    out = []
    for index, token in enumerate(ids):
        later = [other for other in ids[index + 1 :] if other not in (cl, cr)]
        out.append(later[0] if later and token not in (cl, cr) else -100)
    return out


def removed(ids: list[int], cl: int, cr: int) -> int:
    """Σ(length − 1) over the spans."""
    return sum(last - first - has_cl - 1 for first, last, has_cl in spans_of(ids, cl, cr))
