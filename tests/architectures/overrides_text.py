"""Configuration entries of text models that the rules do not reach."""
from __future__ import annotations

from .rules import RATIO, WIDTH, Ratios, Value

ROPE: dict[str, Value] = {"rope_type": "default", "rope_theta": 10000.0}
SPARSE_INDEX: dict[str, Value] = {
    "eos_token_id": 2,    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2, "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [1], "ple_embed_dim": 32,
    "ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 1, "heads_per_ngram": 2, "split_ngram_parts": 1,
}
GEMMA4: dict[str, Value] = {
    "global_head_dim": 16, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
    "moe_intermediate_size": WIDTH,
}

DOTS3: dict[str, Value] = {  # the layers with a window have sizes of their own
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
    "swa_head_dim": 12, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
}
DENSE_FIRST: dict[str, Value] = {"mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2}

TEXT: dict[str, dict[str, Value]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50, "local_attention_window_len": 8},
    "canine": {"num_hash_buckets": 50},
    "cohere2_moe": DENSE_FIRST,
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2,
                            "rope_parameters": {"sliding_attention": ROPE | {"mrope_section": [2, 1, 1]},
                                                "full_attention": ROPE | {"mrope_section": [2, 1, 1]}}},
    "dbrx": {"attn_config.clip_qkv": 8.0, "attn_config.rope_theta": 10000.0, "attn_config.kv_n_heads": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "distilbert": {"hidden_dim": WIDTH},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": DOTS3,
    "dots3_note_text": DOTS3,
    "esm": {"pad_token_id": 0, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
                     "num_kv_shared_layers": 2, "intermediate_size": WIDTH,
                     "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gemma4_text": GEMMA4,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "inkling_text": DENSE_FIRST,
    "inkling2_text": {"rel_extent": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "block_auto_adjust_ff_dim": False},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 16},
    "lilt": {"hidden_size": 48},
    "llama4": {"moe_layers": [1]},
    "llama4_text": {"moe_layers": [1]},
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "markuplm": {"max_depth": 4, "max_xpath_tag_unit_embeddings": 20, "max_xpath_subs_unit_embeddings": 20,
                 "tag_pad_id": 19, "subs_pad_id": 19, "xpath_unit_hidden_size": 8},
    "mellum": DENSE_FIRST,
    "minimax_m3_vl_text": DENSE_FIRST,
    "mistral4": {"first_k_dense_replace": 1},
    "mobilebert": {"intra_bottleneck_size": 24},
    "moshi": {"ffn_dim": 88},  # twice the width
    "nemotron_h": {"n_groups": 2},
    "neomme": {"head_dim": 16},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
                  "num_cross_attention_heads": 4, "self_attention_widening_factor": Ratios((32,), (5,)),
                  "cross_attention_widening_factor": Ratios((32,), (7,))},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"mlp_only_layers": [0]},
    "qwen4_exp": SPARSE_INDEX,
    "qwen4_exp_text": SPARSE_INDEX,
    "recurrent_gemma": {"num_hidden_layers": 3, "intermediate_size": 88},  # twice the width
    "reformer": {"axial_pos_shape": (4, 4), "axial_pos_embds_dim": (8, 24), "attn_layers": ("local", "lsh"),
                 "attention_head_size": 8, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2,
                 "hash_seed": 0, "max_position_embeddings": 16},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "roc_bert": {"pronunciation_vocab_size": 50, "pronunciation_embed_dim": 16, "shape_vocab_size": 50,
                 "shape_embed_dim": 16},
    "squeezebert": {"embedding_size": 32},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "xlstm": {"ffn_proj_factor": RATIO, "ffn_round_up_to_multiple_of": 4},
    "xmod": {"languages": ("en_XX", "de_DE"), "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4,
              "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4,
               "use_shared_attention_adapter": True, "num_key_value_heads": 4, "attention_hidden_size": 64,
               "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
