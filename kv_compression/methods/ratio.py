"""What a compression ratio is, without torch."""


def share_to_remove(num_tokens: int, ratio: float) -> int:
    """The entries that are to leave at a ratio: round(ratio · num_tokens). (Protocol `matched`, this project.)"""
    return round(ratio * num_tokens)


def check_ratio(ratio: float) -> float:
    """Return `ratio`, or raise ValueError unless 0 ≤ ratio < 1."""
    if not 0 <= ratio < 1:
        raise ValueError(f"the compression ratio must be at least 0 and below 1, got {ratio}")
    return ratio
