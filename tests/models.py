"""Random models of a few layers, one for every shape of attention that the patch must serve."""

import torch
import transformers

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
CONFIGS = {
    "gpt_neox": transformers.GPTNeoXConfig(intermediate_size=64, max_position_embeddings=96, **COMMON, **ENDS),
    "llama": transformers.LlamaConfig(
        intermediate_size=64, num_key_value_heads=2, max_position_embeddings=96, **COMMON, **ENDS
    ),
    "wide_llama": transformers.LlamaConfig(  # heads as wide as compiled FlexAttention takes them
        intermediate_size=64, max_position_embeddings=96, **COMMON | {"hidden_size": 64}, **ENDS
    ),
    "opt": transformers.OPTConfig(
        ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, max_position_embeddings=96, **COMMON, **ENDS
    ),
    "gptj": transformers.GPTJConfig(
        n_embd=32, n_layer=2, n_head=4, n_positions=96, rotary_dim=4, vocab_size=64, bos_token_id=0, eos_token_id=0
    ),
    "deepseek_v2": transformers.DeepseekV2Config(  # values narrower than keys, in attention and in the cache
        intermediate_size=64,
        num_key_value_heads=4,
        first_k_dense_replace=4,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        max_position_embeddings=96,
        **COMMON,
        **ENDS,
    ),
}


def random_model(architecture: str, implementation: str = "eager", dtype=torch.float32, seed: int = 0, layers: int = 2):
    """A causal language model in evaluation mode, the same weights for the same seed."""
    torch.manual_seed(seed)
    config = type(CONFIGS[architecture]).from_dict(CONFIGS[architecture].to_dict() | {"num_hidden_layers": layers})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    torch.manual_seed(seed)
    for parameter in model.parameters():  # larger than the usual start, so that a wrong mask shows
        torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).eval()
