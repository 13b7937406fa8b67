"""Small configs of the causal architectures of transformers, made by shrinking what their configs are by default."""

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "lru_width", "word_embed_proj_dim", "embedding_size"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "num_query_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads", "mamba_n_heads", "mamba_num_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "index_n_heads", "linear_num_key_heads"], 2),
    **dict.fromkeys(["head_dim", "kv_channels", "dim_head", "attention_head_size", "rotary_dim", "v_head_dim"], 8),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "index_head_dim", "mamba_d_head", "mamba_head_dim"], 8),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "sliding_window", "attention_chunk_size"], 8),
    **dict.fromkeys(["attention_window_size", "block_size", "state_size", "mamba_d_state", "ssm_state_size"], 8),
    **dict.fromkeys(["hidden_size_per_layer_input", "laurel_rank"], 8),
    **dict.fromkeys(["intermediate_size", "ffn_hidden_size", "n_inner", "hidden_dim", "decoder_ffn_dim"], 48),
    **dict.fromkeys(["encoder_ffn_dim", "ffn_dim", "dim_ff", "dff", "d_inner"], 48),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "index_topk"], 64),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "linear_num_value_heads", "mamba_dt_rank"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 16),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "shared_intermediate_size", "dense_intermediate_size"], 16),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "qk_head_dim"], 16),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "n_groups", "mamba_n_groups"], 1),
    **dict.fromkeys(["first_k_dense_replace"], 1),
    "mamba_d_ssm": 32,
    "conv_kernel": 4,
    "expand": 2,
    "type_vocab_size": 2,
    "vocab_size_per_layer_input": VOCAB,
}
OTHERS = {
    "bamba": {"mamba_n_heads": 8},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "mamba2": {"num_heads": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 16},
    "falcon_h1": {"intermediate_size": 48},
    "zaya": {"num_experts_per_tok": 1},
}
"""Values that an architecture needs besides."""


def small(name: str) -> dict:
    """`model_type` and values of a small config of an architecture."""
    default = CONFIG_MAPPING[name]()
    values = default.to_dict()
    known = {*values, *default.attribute_map}
    sizes = {k: v for k, v in SIZES.items() if k in known and not isinstance(values.get(k), list | dict)}
    if "qk_rope_head_dim" in known:  # latent attention: its keys are as many as its queries
        sizes |= {"num_key_value_heads": 4}
    if values.get("is_decoder") is False:
        sizes["is_decoder"] = True
    return {"model_type": name} | sizes | OTHERS.get(name, {})


PARTS = {
    **{"depth": 1, "image_size": 16, "patch_size": 4, "out_hidden_size": 32, "vision_output_dim": 32},
    **{"deepstack_visual_indexes": [0], "hidden_size_global": 32},
}
"""Values of the parts of a model that has several, such as a vision tower."""
OTHERS_WITH_PARTS = {
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "gemma3n_text": {
        **{"num_kv_shared_layers": 0, "intermediate_size": 48, "activation_sparsity_pattern": [0.0, 0.0]},
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 4},
    "rembert": {"output_embedding_size": 32, "input_embedding_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 8},
}
"""Values that fit each other, which shrinking one by one does not give."""


def small_with_parts(name: str) -> dict:
    """As `small`, with the parts of a model that has several made small as well."""
    default = CONFIG_MAPPING[name]()
    values = small(name)
    for part in getattr(type(default), "sub_configs", {}):
        config = getattr(default, part, None)
        if config is None:
            continue
        known = config.to_dict()
        kind = {"model_type": config.model_type} if getattr(config, "model_type", "") else {}
        sizes = {k: v for k, v in SIZES.items() if k in {*known, *config.attribute_map}}
        sizes = {k: v for k, v in sizes.items() if not isinstance(known.get(k), list | dict)}
        values[part] = kind | sizes | {k: v for k, v in PARTS.items() if k in known}
        if known.get("layer_types"):
            values[part]["layer_types"] = known["layer_types"][:2]
    return values | OTHERS_WITH_PARTS.get(name, {})


NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
