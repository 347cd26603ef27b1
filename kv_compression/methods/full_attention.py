"""Full causal attention: the baseline that drops nothing, and what a teacher without adapters sees."""

from kv_compression.methods.rule import History, MaskMod, Rule, Tokens, causal
from kv_compression.methods.sentinels import is_text


class FullAttention(Rule):
    """Every query sees itself and every earlier key.

        a b c d
    a   1
    b   1 1
    c   1 1 1
    d   1 1 1 1
    """

    name = "full_attention"
    label = "full attention"
    colour = "#000000"
    marker = "P"
    card = "Every token sees every earlier one: the baseline that compresses nothing."

    def sees(self, tokens: Tokens) -> MaskMod:
        return causal

    def is_quiet(self, tokens: Tokens, history: History) -> bool:
        return True


class TextOnly(FullAttention):
    """Full causal attention among text tokens, as if there were no sentinels; only a sentinel itself sees it."""

    def sees(self, tokens: Tokens) -> MaskMod:
        text = is_text(tokens.kinds, self.cl_id, self.cr_id)
        return lambda b, h, q, k: (k <= q) & (text[b, k] | (k == q))

    def is_quiet(self, tokens: Tokens, history: History) -> bool:
        return False
