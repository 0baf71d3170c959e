# SPDX-License-Identifier: Apache-2.0
"""Decoders that read text, without experts."""

from __future__ import annotations

from typing import Any

from tests.oracles.recipes_fields import BLOOM, GEMMA, GEMMA3N, GPT2, GQA, LFM2, LM, OPT, VOCAB, Case, case_of, rope

__all__ = ["DENSE"]

_NEO = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "max_position_embeddings": 64,
    "intermediate_size": 56,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MPT = {"vocab_size": VOCAB, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64, "eos_token_id": None}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}
_LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
_EVERY_OTHER = ["sliding_attention", "full_attention", "sliding_attention"]
_BY_TYPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}


def _llama(**fields: Any) -> Case:
    return case_of("Llama", GQA, **fields)


DENSE: dict[str, Case] = {
    "llama": _llama(),
    "llama_mha_tied_biases": _llama(
        num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=12
    ),
    "llama_llama3": _llama(**_LLAMA3),
    "llama_linear": _llama(**rope("linear", factor=2.5)),
    "llama_dynamic": _llama(max_position_embeddings=10, **rope("dynamic", factor=2.0)),
    "llama_yarn": _llama(**rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama_yarn_tuned": _llama(
        **rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=8.0,
            beta_slow=2.0,
            mscale=0.7,
            mscale_all_dim=1.3,
            truncate=False,
        )
    ),
    "mistral": case_of("Mistral", GQA, sliding_window=48),
    "mistral_short_window": case_of("Mistral", GQA, sliding_window=5),
    "mistral_no_window": case_of("Mistral", GQA, sliding_window=None),
    "qwen2": case_of("Qwen2", GQA),
    "qwen2_windows": case_of("Qwen2", GQA, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": case_of("Qwen3", GQA, head_dim=16, tie_word_embeddings=True),
    "qwen3_biases": case_of("Qwen3", GQA, head_dim=16, attention_bias=True),
    "gemma": case_of("Gemma", GEMMA),
    "gemma2": case_of("Gemma2", GEMMA, sliding_window=5, query_pre_attn_scalar=24, attn_logit_softcapping=5.0),
    "gemma2_uncapped": case_of(
        "Gemma2", GEMMA, sliding_window=48, final_logit_softcapping=None, attn_logit_softcapping=None
    ),
    "gemma3": Case(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**GEMMA, "sliding_window": 5, "sliding_window_pattern": 3, "query_pre_attn_scalar": 24},
    ),
    "gemma3_scaled": Case(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **GEMMA,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": _BY_TYPE,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3n": Case("Gemma3nForCausalLM", "Gemma3nTextConfig", GEMMA3N),
    "gemma3n_switches": Case(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            **GEMMA3N,
            "altup_active_idx": 1,
            "altup_correct_scale": False,
            "attention_bias": True,
            "num_kv_shared_layers": 0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "phi3": case_of("Phi3", GQA, sliding_window=7),
    "phi3_partial": case_of(
        "Phi3", GQA, rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    ),
    "phi3_longrope_short": case_of("Phi3", GQA, original_max_position_embeddings=32, rope_parameters=_LONG),
    "phi3_longrope_long": case_of("Phi3", GQA, original_max_position_embeddings=8, rope_parameters=_LONG),
    "olmo": case_of("Olmo", GQA),
    "olmo2": case_of("Olmo2", GQA),
    "olmo2_biases": case_of("Olmo2", GQA, attention_bias=True),
    "granite": case_of(
        "Granite",
        GQA,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=2.5,
    ),
    "smollm3": case_of("SmolLM3", GQA, no_rope_layer_interval=2, tie_word_embeddings=True),
    "smollm3_windows": case_of(
        "SmolLM3", GQA, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=5, attention_bias=True
    ),
    "stablelm": case_of("StableLm", GQA),
    "stablelm_parallel": case_of(
        "StableLm", GQA, use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=True, partial_rotary_factor=0.5
    ),
    "gpt2": Case("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2_scales": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        {**GPT2, "n_inner": 40, "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
    ),
    "gpt_neox": case_of("GPTNeoX", LM, tie_word_embeddings=False),
    "gpt_neox_sequential": case_of(
        "GPTNeoX", LM, tie_word_embeddings=False, use_parallel_residual=False, attention_bias=False, rotary_pct=0.5
    ),
    "opt": case_of("OPT", OPT),
    "opt_350m": case_of("OPT", OPT, do_layer_norm_before=False, word_embed_proj_dim=20),
    "opt_bare": case_of("OPT", OPT, enable_bias=False, layer_norm_elementwise_affine=False),
    "olmo_clipped": case_of("Olmo", GQA, clip_qkv=0.4),
    "olmo3": case_of("Olmo3", GQA, sliding_window=5, layer_types=_EVERY_OTHER),
    "olmo3_scaled": case_of("Olmo3", GQA, sliding_window=5, layer_types=_EVERY_OTHER, rope_parameters=_BY_TYPE),
    "cwm": case_of("Cwm", GQA, head_dim=16, sliding_window=5, **_LLAMA3),
    "ministral": case_of("Ministral", GQA, head_dim=8, sliding_window=5, layer_types=_EVERY_OTHER),
    "ministral3": case_of(
        "Ministral3",
        GQA,
        head_dim=16,
        **rope("yarn", factor=4.0, original_max_position_embeddings=4, llama_4_scaling_beta=0.3),
    ),
    "vaultgemma": case_of("VaultGemma", GEMMA, sliding_window=5, query_pre_attn_scalar=24, attn_logit_softcapping=5.0),
    "hyperclovax": case_of(
        "HyperCLOVAX",
        GQA,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=0.4,
    ),
    "hyperclovax_plain": case_of("HyperCLOVAX", GQA, use_post_norm=False, attention_bias=True, mlp_bias=True),
    "phi": case_of("Phi", GQA),
    "phi_normed": case_of("Phi", LM, qk_layernorm=True, **rope("default", partial_rotary_factor=0.25)),
    "starcoder2": case_of("Starcoder2", GQA, sliding_window=5),
    "starcoder2_plain": case_of("Starcoder2", GQA, use_bias=False),
    "falcon_7b": case_of("Falcon", LM),
    "falcon_40b": case_of("Falcon", LM, new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=False),
    "falcon_11b": case_of(
        "Falcon", LM, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, ffn_hidden_size=40
    ),
    "falcon_rw": case_of("Falcon", LM, alibi=True, bias=True, multi_query=False, parallel_attn=False),
    "bloom": case_of("Bloom", BLOOM),
    "bloom_six_heads": case_of("Bloom", BLOOM, hidden_size=48, n_head=6),
    "gptj": case_of("GPTJ", GPT2, rotary_dim=4),
    "gpt_neo": case_of("GPTNeo", _NEO, window_size=5, attention_types=[[["global", "local", "local"], 1]]),
    "cohere": case_of("Cohere", GQA, tie_word_embeddings=True, logit_scale=0.7),
    "cohere_normed": case_of("Cohere", GQA, use_qk_norm=True, attention_bias=True, logit_scale=0.4),
    "cohere2": case_of(
        "Cohere2", GQA, sliding_window=5, layer_types=_EVERY_OTHER, tie_word_embeddings=True, logit_scale=0.7
    ),
    "glm": case_of("Glm", GQA, head_dim=16),
    "glm4": case_of("Glm4", GQA, head_dim=16, attention_bias=False),
    "exaone4": case_of("Exaone4", GQA, sliding_window=5, sliding_window_pattern=2),
    "exaone4_global": case_of("Exaone4", GQA, sliding_window=None, layer_types=["full_attention"] * 3),
    "nemotron": case_of("Nemotron", GQA, head_dim=16),
    "nemotron_biases": case_of("Nemotron", GQA, attention_bias=True, mlp_bias=True),
    "jais2": case_of("Jais2", GQA),
    "arcee": case_of("Arcee", GQA, mlp_bias=True, attention_bias=True),
    "apertus": case_of("Apertus", GQA, **_LLAMA3),
    "hunyuan": case_of("HunYuanDenseV1", GQA, head_dim=16),
    "hunyuan_alpha": case_of("HunYuanDenseV1", GQA, head_dim=16, **rope("dynamic", factor=1.0, alpha=50.0)),
    "ernie4_5": case_of("Ernie4_5", GQA, head_dim=16, use_bias=True),
    "helium": case_of("Helium", GQA, head_dim=8, attention_bias=True),
    "seed_oss": case_of("SeedOss", GQA, head_dim=16, attention_out_bias=True),
    "gpt_bigcode": case_of("GPTBigCode", GPT2),
    "gpt_bigcode_heads": case_of("GPTBigCode", GPT2, multi_query=False, scale_attn_weights=False),
    "mpt": case_of("Mpt", _MPT),
    "mpt_clipped": case_of("Mpt", _MPT, n_heads=2, attn_config={"clip_qkv": 0.4, "softmax_scale": 0.3}),
    "mpt_six_heads": case_of("Mpt", _MPT, d_model=48, n_heads=6),
    "persimmon": case_of("Persimmon", LM),
    "persimmon_plain": case_of("Persimmon", LM, qk_layernorm=False, hidden_act="gelu"),
    "lfm2": case_of("Lfm2", LFM2, layer_types=["conv", "full_attention", "conv"]),
    "lfm2_wide": case_of("Lfm2", LFM2, full_attn_idxs=[0], conv_L_cache=4, block_auto_adjust_ff_dim=False),
}
