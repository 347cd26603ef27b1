"""A tiny random model of every causal language model that transformers can build.

`tiny_model("mistral")` has four layers of width 32 over 64 tokens, windows and chunks of 8 tokens, and every kind of
layer that its architecture knows. A name may carry a variant, `"falcon (alibi)"`, where one type stands for several
architectures. Sizes are found by their names in the default configuration; `NEEDS` holds what a type wants besides.
"""

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 4
SIZES = [
    (
        64,
        "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size audio_vocab_size"
        " intermediate_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size ffn_dim"
        " decoder_ffn_dim dff dim_ff encoder_ffn_dim ffn_hidden_size expert_ffn_hidden_size d_inner"
        " feed_forward_size intermediate_size_mlp dense_intermediate_size shared_experts_intermediate_size"
        " moe_shared_expert_intermediate_size prefix_dense_intermediate_size",
    ),
    (
        32,
        "hidden_size d_model n_embd emb_dim embedding_dim word_embed_proj_dim embedding_size input_embedding_size"
        " output_embedding_size attention_hidden_size lru_width backbone_hidden_size router_hidden_size"
        " pronunciation_embed_dim shape_embed_dim cross_attention_hidden_size hidden_size_global",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"
        " encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads"
        " linear_num_heads linear_num_key_heads linear_num_value_heads index_n_heads n_mamba_heads mamba_n_heads"
        " mamba_num_heads num_experts n_routed_experts num_local_experts moe_num_experts",
    ),
    (
        2,
        "num_key_value_heads swa_num_key_value_heads kv_n_heads num_kv_heads depth num_experts_per_tok moe_topk"
        " moe_k num_experts_per_token moe_top_k top_k_experts",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers"
        " num_blocks num_encoder_layers",
    ),
    (
        8,
        "head_dim swa_head_dim d_head dim_head attention_head_size attention_head_dim linear_head_dim"
        " linear_key_head_dim linear_value_head_dim index_head_dim kv_channels query_pre_attn_scalar rotary_dim"
        " q_lora_rank qk_rope_head_dim qk_nope_head_dim o_lora_rank state_size mamba_d_state ssm_state_size"
        " time_step_rank mamba_dt_rank gated_norm_rank laurel_rank hidden_size_per_layer_input rel_extent"
        " adapter_rank hc_lowrank d_rel index_topk keep_window_size chunk_size mamba_chunk_size block_size"
        " sliding_window window_size sliding_window_size attention_window_size local_attention"
        " attention_chunk_size local_attention_window_len floor_scale",
    ),
    (
        12,
        "kv_lora_rank v_head_dim",
    ),
    (
        16,
        "mamba_d_head mamba_head_dim",
    ),
    (
        256,
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length"
        " max_source_positions max_target_positions original_max_position_embeddings",
    ),
    (
        1,
        "n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups first_k_dense_replace"
        " num_dense_layers o_groups",
    ),
    (
        0.0,
        "attention_dropout hidden_dropout activation_dropout dropout resid_pdrop embd_pdrop attn_pdrop emb_pdrop"
        " hidden_dropout_prob attention_probs_dropout_prob resid_dropout embed_dropout residual_dropout"
        " embedding_dropout",
    ),
]
SIZE_OF = {}
for _size, _names in SIZES:
    SIZE_OF |= dict.fromkeys(_names.split(), _size)

SLIDING = ["sliding_attention", "full_attention"] * 2
LINEAR = ["linear_attention", "full_attention"] * 2
ALL_HEADS = {"num_key_value_heads": 4}
INDEXED = ALL_HEADS | {"indexer_types": ["full", "shared"] * 2}
THETAS = {"layer_rope_theta": [10000.0] * LAYERS}
DECODER = {"is_decoder": True}
MULTIMODAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LLAMA_4_SCALING = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "llama_4_scaling_beta": 0.1}
LLAMA_4_SCALING |= {"original_max_position_embeddings": 8}
BERTS = [
    "bert",
    "bert-generation",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
]
BERTS += ["roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"]
DRAFTER = "it drafts for another model, whose keys it reads"
OF_SEVERAL = "its configuration is of three models, and AutoModelForCausalLM does not find the decoder's"

NEEDS = {
    "axk1": ALL_HEADS,
    "axk2": ALL_HEADS,
    "bailing_hybrid": ALL_HEADS | {"layer_types": LINEAR, "mlp_layer_types": ["dense", "sparse"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "bert (bidirectional)": {"is_decoder": False},
    "big_bird": DECODER | {"block_size": 2, "num_random_blocks": 1},
    "big_bird (full)": DECODER | {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(SLIDING, MULTIMODAL_ROPE), "layer_types": SLIDING},
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64},
    },
    "deepseek_v2": ALL_HEADS | {"num_experts_per_tok": 2},
    "deepseek_v3": ALL_HEADS,
    "deepseek_v32": ALL_HEADS,
    "doge (short texts)": {"sliding_window": None, "keep_window_size": 256},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "layer_types": SLIDING},
    "dots3_note": {
        "vision_config": {"adapter_out_dim": 32, "adapter_in_dim": 32},
        "audio_config": {"adapter_out_dim": 32, "adapter_input_size": 32},
    },
    "dots3_note_text": ALL_HEADS
    | {"head_dim": 16, "per_layer_config": {layer: {"kv_lora_rank": 16} for layer in (1, 3)}},
    "falcon (alibi)": {"alibi": True},
    "falcon (new decoder)": {"new_decoder_architecture": True},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma2 (bidirectional)": {"use_bidirectional_attention": True},
    "gemma3_text (bidirectional)": {"use_bidirectional_attention": True},
    "gemma3n_text": {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gemma4_text": {"per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}}},
    "gemma4_text (shared keys)": {
        "per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}},
        "num_kv_shared_layers": 2,
    },
    "gemma4_unified_text": {"per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}}},
    "glm4_moe_lite": ALL_HEADS,
    "glm_moe_dsa": INDEXED,
    "gpt_bigcode (many heads)": {"multi_query": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite_swa": THETAS,
    "granitemoe_swa": THETAS,
    "granitemoehybrid": {"layer_types": LINEAR},
    "granitemoehybrid (attention)": {"layer_types": ["full_attention"] * LAYERS, "position_embedding_type": "rope"},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hy_v4": INDEXED,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": ALL_HEADS,
    "laguna": {"layer_types": SLIDING, "num_attention_heads_per_layer": [4] * LAYERS},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama (bidirectional)": {"is_causal": False},
    "llama (dynamic rope)": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        "max_position_embeddings": 16,
    },
    "llama4_text (one temperature)": {"attn_temperature_tuning": False},
    "longcat_flash": ALL_HEADS | {"num_layers": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": SLIDING},
    "minicpm3": ALL_HEADS,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_n_heads": 2}
    | {"index_block_size": 4, "index_topk_blocks": 2, "index_local_blocks": 1},
    "minimax_m3_vl_text (full)": {"layer_types": ["full_attention"] * LAYERS},
    "ministral": {"head_dim": 8, "layer_types": SLIDING},
    "ministral3": {"rope_parameters": LLAMA_4_SCALING},
    "mistral (no window)": {"sliding_window": None},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "nemotron": ALL_HEADS,
    "phi3 (longrope)": {
        "rope_parameters": LONG_ROPE,
        "original_max_position_embeddings": 16,
        "sliding_window": None,
        "pad_token_id": 0,
    },
    "qwen2": {"use_sliding_window": True, "layer_types": SLIDING},
    "qwen2 (no window)": {},
    "qwen2_moe": {"use_sliding_window": True, "layer_types": SLIDING},
    "qwen3": {"use_sliding_window": True, "layer_types": SLIDING},
    "qwen3_moe": {"use_sliding_window": True},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
    | {"indexer_compress_ratio": 2, "ple_layer_ids": [1], "ple_embed_dim": 32, "hc_count": 2, "eos_token_id": 2}
    | {"ngram_vocab_size_base": 64, "split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 8},
    "reformer": DECODER
    | {"attn_layers": ["local", "lsh"] * 2, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]}
    | {"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4, "hash_seed": 0},
    "smollm3": {"use_sliding_window": True, "layer_types": SLIDING, "no_rope_layers": [1, 0, 1, 0]},
    "xlm (causal)": {"causal": True},
    "xmod": DECODER | {"default_language": "en_XX"},
    "youtu": ALL_HEADS,
    "zamba": ALL_HEADS | {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 2},
    "zamba2": ALL_HEADS | {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 2},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2},
}
NEEDS |= {name: DECODER for name in BERTS}
NOT_ALONE = {
    "gemma4_assistant": DRAFTER,
    "gemma4_unified_assistant": DRAFTER,
    "musicgen": OF_SEVERAL,
    "musicgen_melody": OF_SEVERAL,
}
CAN_BE_NONE = {"sliding_window"}  # set although a default configuration leaves it out
LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")


def all_names() -> list[str]:
    """Every model type that is a causal language model, and its variants behind it."""
    variants = [name for name in NEEDS if " (" in name]
    return [
        name
        for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        for name in (model_type, *(name for name in variants if name.split(" (")[0] == model_type))
    ]


def small_values(config: PreTrainedConfig) -> dict:
    """The settings of a default configuration that have to shrink: sizes, lists of layers, ids beyond 64 tokens."""
    values = {}
    for name, value in config.to_dict().items():
        if name in SIZE_OF and (value is not None or name in CAN_BE_NONE):
            values[name] = SIZE_OF[name]
        elif name in LAYER_LISTS and value:
            kinds = list(dict.fromkeys(value))
            values[name] = [kinds[layer % len(kinds)] for layer in range(LAYERS)]
        elif name.endswith(("_token_id", "_token_index")) and (isinstance(value, list) or (value or 0) > 63):
            values[name] = 0 if name in ("bos_token_id", "eos_token_id", "pad_token_id") else 63
    return values


def tiny_config(kind: type[PreTrainedConfig], needs: dict) -> PreTrainedConfig:
    """A small configuration of a class, `needs` on top; those it is made of shrink likewise."""
    default = kind()
    needs = dict(needs)
    values = small_values(default)
    for part in getattr(kind, "sub_configs", None) or {}:
        value = getattr(default, part, None)
        if isinstance(value, PreTrainedConfig):
            values[part] = tiny_config(type(value), NEEDS.get(value.model_type, {}) | needs.pop(part, {}))
    return kind(**values | needs)


def tiny_model(name: str, implementation: str | None = None, dtype=torch.float64) -> nn.Module:
    """A random model in evaluation mode, without gradients; the same weights for the same name.

    `implementation` is the attention's, by default the one that transformers chooses. Raises ValueError for a type that
    is no language model alone, and whatever transformers raises where it cannot build one.
    """
    model_type = name.split(" (")[0]
    if model_type in NOT_ALONE:
        raise ValueError(NOT_ALONE[model_type])
    config = tiny_config(CONFIG_MAPPING[model_type], NEEDS.get(name, {}))
    kwargs = {"attn_implementation": implementation}
    try:  # experts as a loop: the fused ones know no float64
        model = AutoModelForCausalLM.from_config(config, experts_implementation="eager", **kwargs)
    except (TypeError, ValueError):
        model = AutoModelForCausalLM.from_config(config, **kwargs)
    generator = torch.Generator().manual_seed(0)
    for part, parameter in model.named_parameters():  # larger than the usual start, so that a wrong mask shows
        is_scale = parameter.dim() == 1 and "norm" in part.lower() and "weight" in part
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.1 * values if is_scale else 0.15 * values)
    return model.to(dtype).eval().requires_grad_(False)


transformers.logging.set_verbosity_error()
