"""What a model's own attention asks of a patch: the pattern of every layer, and which architectures cannot be right."""

from typing import NamedTuple

from torch import Tensor, nn

from kv_compression.methods.rule import MaskMod


class Pattern(NamedTuple):
    """What a layer hides by itself: with "sliding" keys that are `size` or more text positions away, with "chunked"
    those of other chunks of `size` positions, with "full" nothing."""

    kind: str
    size: int = 0

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries at these text positions may see keys at those; bool, as the two broadcast."""
        if self.kind == "sliding":
            return query - key < self.size
        return query // self.size == key // self.size

    def over(self, rule: MaskMod, positions: Tensor) -> MaskMod:
        """`rule` within this pattern, for tokens at `positions` `(batch, length)`.

        Every token sees itself: what else the rule lets it see may be too far away.
        """
        return lambda b, h, q, k: (rule(b, h, q, k) & self.allows(positions[b, q], positions[b, k])) | (q == k)


FULL = Pattern("full")


def patterns_of(decoder: nn.Module) -> dict[str, Pattern]:
    """The patterns of a decoder's layers by type of layer. ValueError if one cannot be intersected with a rule."""
    config = decoder.config
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    sliding = Pattern("sliding", window) if window else FULL
    known = {"full_attention": FULL, "sliding_attention": sliding}
    known["chunked_attention"] = Pattern("chunked", chunk) if chunk else FULL
    types = set(getattr(config, "layer_types", None) or ())
    if not types:
        return {"all": sliding}
    unknown = sorted(types - known.keys())
    if unknown:
        raise ValueError(
            f"{config.model_type} has layers of the type {unknown[0]}, which hold no keys that could leave"
        )
    return {layer_type: known[layer_type] for layer_type in sorted(types)}
