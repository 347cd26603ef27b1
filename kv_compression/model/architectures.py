"""What is asked of a model: its parts, the pattern of every layer, and which architectures a patch can be right for.

`benchmarks/architectures.py` builds every causal language model of transformers at tiny size and checks both: its table
is docs/architectures.md.
"""

import inspect
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kv_compression.methods.rule import MaskMod

# By transformers' model_type. Of these a patched model gives the untouched model's logits under full attention, and a
# cache those of one masked pass. Add one of your own once benchmarks/architectures.py finds it right.
RIGHT = set(
    """
    afmoe apertus arcee aria_text axk1 beam biogpt bitnet codegen cohere cohere2 cohere2_moe cohere_compass_text
    ctrl cwm dbrx deepseek_v2 deepseek_v3 diffllama dots1 emu3 emu3_text_model ernie4_5 ernie4_5_moe exaone4
    exaone_moe falcon flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm
    glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj granite
    granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama llama4 llama4_text
    longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral
    mixtral mllama mllama_text_model nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3
    phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2
    vaultgemma whisper xglm youtu
    """.split()  # noqa: SIM905 (a line of names reads better)
)
ALIBI = "ALiBi takes distances from a key's place in the cache"
INDEXED = "its layers pick keys by content, from an index of their own that no key leaves"
CONVOLVES = "its layers mix neighbouring tokens by convolution, whatever a mask hides"
ENCODER = "it is an encoder"
EMBEDS = "it hands its language model embeddings in place of token ids: load the text model alone"
OFFSET = "it counts positions from its padding token on"
OWN_MASKS = "it makes its masks itself, from padding alone"
WRONG = {
    **dict.fromkeys(("axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4"), INDEXED),
    **dict.fromkeys(("inkling_text", "inkling2_text", "lfm2", "lfm2_moe", "lfm3", "zaya"), CONVOLVES),
    **dict.fromkeys(("fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2"), EMBEDS),
    "moss_transcribe_diarize": EMBEDS,
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"), OFFSET),
    **dict.fromkeys(("xlm-roberta-xl", "xmod"), OFFSET),
    **dict.fromkeys(("openai-gpt", "prophetnet", "reformer", "xlm", "xlnet"), OWN_MASKS),
    **dict.fromkeys(("bert", "bert-generation", "electra", "ernie", "megatron-bert", "rembert", "roc_bert"), ENCODER),
    "big_bird": "its block-sparse attention makes its masks itself",
    "blt": "it groups bytes into patches and makes a mask for each of its parts",
    "deepseek_v4": "it compresses its keys itself, in blocks by their place",
    "doge": "it chooses keys by content, beside the mask",
    "moshi": "its configuration names a window that it does not use",
    **dict.fromkeys(("bloom", "mpt"), ALIBI),
    "gpt_neo": "its local layers cut by a key's place in the cache",
}
# What the classes of layers that keep no keys are called.
RECURRENT = "Mamba|Mixer$|DeltaNet|DeltaAttention|Rwkv|RWKV|xLSTM|Rglru|Lightning|LinearAttention"
# Options of a configuration that make any architecture wrong.
OPTIONS = (
    ("alibi", True, ALIBI),
    ("is_causal", False, "its tokens see later ones"),
    ("use_bidirectional_attention", True, "its tokens see later ones"),
    ("attn_temperature_tuning", True, "it scales queries by their place in the cache (attn_temperature_tuning)"),
)


class Pattern(NamedTuple):
    """What a layer hides by itself.

    "sliding": keys that are `size` or more text positions away; "chunked": keys of other chunks of `size` positions;
    "full": nothing.
    """

    kind: str
    size: int = 0

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries at these text positions may see keys at those; bool, of the shape that both broadcast to."""
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
    """The patterns of a decoder's layers, by type of layer. ValueError if some layers are not attention."""
    config = decoder.config
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    sliding = Pattern("sliding", window) if window else FULL
    known = {"full_attention": FULL, "sliding_attention": sliding}
    known["chunked_attention"] = Pattern("chunked", chunk) if chunk else FULL
    types = sorted(set(getattr(config, "layer_types", None) or ()))
    if not types:
        return {"all": sliding}
    for layer_type in types:
        if layer_type not in known:
            raise refusal(config.model_type, f"it has {layer_type} layers, which hold no keys that could leave")
    return {layer_type: known[layer_type] for layer_type in types}


def check_architecture(model: nn.Module, decoder: nn.Module) -> None:
    """Raise ValueError, with the reason, unless a patched model of this architecture is known to be right."""
    if getattr(decoder, "config", None) is None:
        raise refusal(model.config.model_type, "transformers does not tell its decoder")
    for config in (model.config, decoder.config):
        if config.model_type in WRONG:
            raise refusal(config.model_type, WRONG[config.model_type])
    name = decoder.config.model_type
    layers = {type(module).__name__ for module in decoder.modules()}
    if any(re.search(RECURRENT, layer) for layer in layers):
        raise refusal(name, "its layers keep a recurrent state in place of keys")
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise refusal(name, "its decoder takes no position_ids: they come from the cache's length")
    for option, value, reason in OPTIONS:
        if getattr(decoder.config, option, None) is value:
            raise refusal(name, reason)
    if name not in RIGHT:
        reason = "nobody has checked it: if benchmarks/architectures.py finds it right, add it to architectures.RIGHT"
        raise refusal(name, reason)


def positions_of(config) -> int | None:
    """How many positions a model has, None if it has any number.

    Where rotary angles change with the length of the text, as many as leave them alone: a cache holds old ones.
    """
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type") in ("dynamic", "longrope"):
        original = rotary.get("original_max_position_embeddings")
        return original or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return getattr(config, "max_position_embeddings", None)


def refusal(model_type: str, reason: str) -> ValueError:
    """The error that names an architecture and why it cannot be patched."""
    return ValueError(f"{model_type} cannot be patched: {reason}")


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder that a patch hooks: of a causal language model, or of a peft model around one."""
    causal_lm = causal_lm_of(model)
    decoder = causal_lm.get_decoder()
    # Where its prefix is not the name of its decoder (Llama 4), transformers gives the language model itself.
    return causal_lm.model if decoder is causal_lm and hasattr(causal_lm, "model") else decoder


def causal_lm_of(model: nn.Module) -> nn.Module:
    """The causal language model itself: what a peft model wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def input_device(model: nn.Module) -> torch.device:
    """The device on which token ids belong: the one where the input embedding is computed.

    accelerate's hooks say so for a model that is offloaded or spread over devices (`device_map`): its weights may lie
    on "meta" until they are needed.
    """
    embedding = causal_lm_of(model).get_input_embeddings()
    for module in embedding.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if getattr(each, "execution_device", None) is not None:
                return torch.device(each.execution_device)
    parameters = (*embedding.parameters(), *model.parameters())
    return next((each.device for each in parameters if not each.is_meta), parameters[0].device)
