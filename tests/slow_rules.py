"""The rules again, restated token by token in plain Python: slow, obvious, and what the fast ones are held to."""

from math import ceil, floor


def spans_of(ids: list[int], cl: int, cr: int, cr_tokens: int = 1) -> list[tuple[int, int, bool]]:
    """Spans as (first token or <CL>, index of the first <CR>, whether there is a <CL>) in a block's order.

    A <CR> without a <CL> closes a span from the block's first token on; a later one without a <CL> an empty span. A
    <CR> right behind another belongs to the same span until that has `cr_tokens`.
    """
    spans, opened, seen_sentinel, in_row = [], None, False, 0
    for index, token in enumerate(ids):
        if token == cl:
            opened, seen_sentinel = index, True
        elif token == cr and not 0 < in_row < cr_tokens:
            if opened is not None:
                spans.append((opened, index, True))
            else:
                spans.append((index if seen_sentinel else 0, index, False))
            opened, seen_sentinel = None, True
        in_row = in_row + 1 if token == cr else 0
    return spans


def head_of(ids: list[int], k: int, cr: int, cr_tokens: int) -> int:
    """The first <CR> of the span that the <CR> at k closes."""
    start = k
    while start > 0 and ids[start - 1] == cr:
        start -= 1
    rank = k - start
    return start if rank < cr_tokens else k


def visible(
    ids: list[int], q: int, k: int, cl: int, cr: int, sinks: int = 0, cr_tokens: int = 1, context=False, recent=0
) -> bool:
    """Whether query q sees key k under KV compression."""
    if k > q:
        return False
    if k == q:
        return True
    at = positions(ids, cl, cr)
    now = at[q] + (ids[q] == cr)
    is_text = ids[k] not in (cl, cr)
    if is_text and at[k] < sinks:
        return True
    if ids[q] == cl:
        return False
    spans = spans_of(ids, cl, cr, cr_tokens)
    if ids[q] == cr:
        head = head_of(ids, q, cr, cr_tokens)
        if any(last == head and first <= k for first, last, _ in spans):
            return True
        if not context:
            return False
    if ids[k] == cl:
        return False
    if ids[k] == cr:
        if not recent:
            return True
        head = head_of(ids, k, cr, cr_tokens)
        first, last, _ = next(span for span in spans if span[1] == head)
        to_go = [at[i] for i in range(first, last) if ids[i] not in (cl, cr) and at[i] >= sinks]
        return not to_go or now > to_go[0] + recent
    of_key = [span for span in spans if span[0] <= k < span[1]]
    of_query = [span for span in spans if span[0] <= q < span[1]]
    if not of_key or (of_key == of_query and ids[q] != cr):
        return True
    return recent > 0 and now <= at[k] + recent


def kv_mask(ids: list[int], cl: int, cr: int) -> list[list[bool]]:
    return [[visible(ids, q, k, cl, cr) for k in range(len(ids))] for q in range(len(ids))]


def sink_mask(length: int, ratio: float, sinks: int) -> list[list[bool]]:
    """Every query sees its first and its most recent keys, a share 1 − ratio in all."""
    mask = []
    for q in range(length):
        kept = ceil((1 - ratio) * (q + 1))
        first = list(range(min(sinks, kept)))
        recent = list(range(q, -1, -1))[: kept - len(first)]
        mask.append([k in first or k in recent for k in range(length)])
    return mask


def held_keys(mask: list[list[bool]], q: int) -> int:
    """Keys up to q that query q or a later one sees, its own among them."""
    return sum(k == q or any(mask[later][k] for later in range(q, len(mask))) for k in range(q + 1))


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


def removed(ids: list[int], cl: int, cr: int, sinks: int = 0, cr_tokens: int = 1, recent: int = 0) -> int:
    """Tokens of closed spans that nothing behind the block could see, less the <CR>: Σ(length − 1) by default."""
    at = positions(ids, cl, cr)
    text = [index for index, token in enumerate(ids) if token not in (cl, cr)]
    spans = spans_of(ids, cl, cr, cr_tokens)
    gone = [k for k in text if any(first <= k < last for first, last, _ in spans)]
    gone = [k for k in gone if at[k] >= sinks and at[k] + recent < len(text)]
    return len(gone) - ids.count(cr)


def own_pattern(q: int, k: int, kind: str, size: int) -> bool:
    """Whether a layer's own sliding window or chunk lets the text position q see k."""
    return q - k < size if kind == "sliding" else q // size == k // size
