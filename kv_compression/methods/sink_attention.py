"""Sink attention: the first few keys and a window, what many would use in place of a trained method."""

from dataclasses import dataclass

from torch import Tensor

from kv_compression.methods.local_attention import LocalAttention

SINKS = 4  # as many as StreamingLLM keeps


@dataclass(frozen=True)
class SinkAttention(LocalAttention):
    """A query q sees its first min(sinks, kept) keys and its most recent, kept = ⌈(1 − ratio)(q + 1)⌉ in all.

    There are 4 sinks, or `sink_tokens` if that is not 0. The product is taken in double precision, as for local
    attention: 1 − 0.7 is a little more than 0.3 there, and one more key is kept where the exact product is whole.
    Where so few are kept that all of them are sinks, a query does not even see itself. Drawn for ratio 0.5 and 2 sinks:

            a b c d e f g
        a   1
        b   1 .
        c   1 1 .
        d   1 1 . .
        e   1 1 . . 1
        f   1 1 . . . 1
        g   1 1 . . . 1 1

    (StreamingLLM, Xiao et al. 2024, for sinks and a window; this project for the shares.)
    """

    sink_tokens: int = 0

    name = "sink_attention"
    label = "sink attention"
    colour = "#CC79A7"
    marker = "D"
    card = "A token sees the text's first few keys and the most recent ones, the share 1 − ratio of all."

    def __post_init__(self):
        super().__post_init__()
        if self.sink_tokens < 0:
            raise ValueError("sink_tokens must be at least 0")

    @property
    def sinks(self) -> int:
        """How many of the first keys are kept."""
        return self.sink_tokens or SINKS

    def window(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        kept = ((1 - self.ratio) * (queries + 1).double()).ceil().long()
        sinks = kept.clamp(max=self.sinks)
        return sinks, queries + 1 - (kept - sinks)
