"""The names of `kv_compression.methods` in one module."""

from kv_compression.fields import check_ratio
from kv_compression.methods import METHODS
from kv_compression.methods.cost import MaskCost, measure
from kv_compression.methods.full_attention import FullAttention, TextOnly
from kv_compression.methods.kv_compression import CR_VISIBILITIES, KVCompression
from kv_compression.methods.local_attention import LocalAttention
from kv_compression.methods.rule import MaskMod, Rule, block_mask, dense_mask, in_order
from kv_compression.methods.scattered_attention import ScatteredAttention, draw_keys
from kv_compression.methods.sink_attention import SINKS, SinkAttention

__all__ = [
    "CR_VISIBILITIES",
    "METHODS",
    "SINKS",
    "FullAttention",
    "KVCompression",
    "LocalAttention",
    "MaskCost",
    "MaskMod",
    "Rule",
    "ScatteredAttention",
    "SinkAttention",
    "TextOnly",
    "block_mask",
    "check_ratio",
    "dense_mask",
    "draw_keys",
    "in_order",
    "measure",
]
