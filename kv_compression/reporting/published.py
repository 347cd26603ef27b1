"""The figures that others have published on claim 1, as data: WikiText-2 test perplexity of RedPajama-3B.

"paper" is the paper's table; the authors' scripts pass no learning rate (default 5e-5) and no seed, and evaluate the
validation split. "repro" was trained at 2e-5 with seed 0 and scored on the test split. Both in fp32.

Knows numbers only. They belong to that one model: beside another's, shapes compare and heights do not.
"""

MODEL = "RedPajama-INCITE-Base-3B"
SOURCES = {
    "paper": "Ren, Jia and Zhu, EMNLP 2023 (2023.emnlp-main.794)",
    "repro": "an independent reproduction of it",
}
METHODS = ("local_attention", "scattered_attention", "kv_compression")

_TABLE = (
    # ratio, then paper and repro of each of METHODS; ratio 0 is full attention in every column
    (0.0, 11.2, 10.33, 11.2, 10.33, 11.2, 10.33),
    (0.1, 11.3, 10.99, 13.1, 12.80, 11.4, 11.55),
    (0.2, 11.5, 11.31, 16.5, 16.03, 11.5, 12.15),
    (0.3, 11.8, 11.85, 20.7, 20.23, 11.8, 12.66),
    (0.4, 12.2, 12.12, 26.6, 26.52, 11.9, 13.08),
    (0.5, 12.9, 12.83, 34.9, 35.11, 12.3, 13.46),
    (0.6, 13.6, 13.62, 47.2, 46.87, 13.5, 13.53),
    (0.7, 14.8, 15.00, 65.7, 64.38, 13.7, 13.68),
    (0.8, 17.2, 17.45, 91.6, 90.35, 13.8, 13.79),
    (0.9, 22.9, 24.07, 135.9, 138.28, 14.0, 13.87),
)


def perplexities(source: str, method: str) -> dict[float, float]:
    """Published perplexity by nominal ratio, ratio 0 (full attention) included; empty for other methods."""
    if method not in METHODS:
        return {}
    column = 1 + 2 * METHODS.index(method) + list(SOURCES).index(source)
    return {row[0]: row[column] for row in _TABLE}


def above_full(source: str, method: str) -> dict[float, float]:
    """Published perplexity ÷ the same source's perplexity of full attention, by nominal ratio."""
    figures = perplexities(source, method)
    return {ratio: value / figures[0.0] for ratio, value in figures.items()}
