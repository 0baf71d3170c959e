# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every family with a recipe, and of every switch a recipe reads.

Norms and biases are random too: gains of one would hide a norm that is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = [
    "DECODERS",
    "ENCODERS",
    "HEADS",
    "IMAGES",
    "MIXTURES",
    "PAIRS",
    "TOWERS",
    "VOCAB",
    "Case",
    "build",
    "load",
    "made",
]

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB = 99


@dataclass(frozen=True)
class Case:
    """One model: class and fields of its configuration."""

    cls: str
    config: str
    fields: Mapping[str, Any]


_LM: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GQA = {**_LM, "num_key_value_heads": 2, "tie_word_embeddings": False}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GEMMA = {**_GQA, "head_dim": 16, "tie_word_embeddings": True}
_OPT = {**_LM, "ffn_dim": 56, "word_embed_proj_dim": 32}
_FALCON = {**_LM, "bos_token_id": 1}
_BLOOM = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 3, "n_head": 4, "eos_token_id": None, "pad_token_id": 0}
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
_BERT = {**_LM, "type_vocab_size": 2, "num_labels": 3}
_MPNET = {**_BERT, "pad_token_id": 1}
_DEBERTA: dict[str, Any] = {
    **_BERT,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 4,
    "max_relative_positions": 8,
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}
_MODERN: dict[str, Any] = {
    **_LM,
    "num_labels": 3,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "local_attention": 4,
}
_JINA = {**_BERT, "pad_token_id": 1, "type_vocab_size": 1}
_EURO = {**_GQA, "num_labels": 3}
_DEBERTA_1 = {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
_DISTIL = {
    "vocab_size": VOCAB,
    "dim": 32,
    "hidden_dim": 56,
    "n_layers": 3,
    "n_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 0,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 56,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


def _llama(**fields: Any) -> Case:
    return Case("LlamaForCausalLM", "LlamaConfig", {**_GQA, **fields})


def _of(name: str, fields: Mapping[str, Any], **more: Any) -> Case:
    return Case(f"{name}ForCausalLM", f"{name}Config", {**fields, **more})


_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
_EVERY_OTHER = ["sliding_attention", "full_attention", "sliding_attention"]
_BY_TYPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

DECODERS: dict[str, Case] = {
    "llama": _llama(),
    "llama_mha_tied_biases": _llama(
        num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=12
    ),
    "llama_llama3": _llama(**_LLAMA3),
    "llama_linear": _llama(**_rope("linear", factor=2.5)),
    "llama_dynamic": _llama(max_position_embeddings=10, **_rope("dynamic", factor=2.0)),
    "llama_yarn": _llama(**_rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama_yarn_tuned": _llama(
        **_rope(
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
    "mistral": _of("Mistral", _GQA, sliding_window=48),
    "mistral_short_window": _of("Mistral", _GQA, sliding_window=5),
    "mistral_no_window": _of("Mistral", _GQA, sliding_window=None),
    "qwen2": _of("Qwen2", _GQA),
    "qwen2_windows": _of("Qwen2", _GQA, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": _of("Qwen3", _GQA, head_dim=16, tie_word_embeddings=True),
    "qwen3_biases": _of("Qwen3", _GQA, head_dim=16, attention_bias=True),
    "gemma": _of("Gemma", _GEMMA),
    "gemma2": _of("Gemma2", _GEMMA, sliding_window=5, query_pre_attn_scalar=24, attn_logit_softcapping=5.0),
    "gemma2_uncapped": _of(
        "Gemma2", _GEMMA, sliding_window=48, final_logit_softcapping=None, attn_logit_softcapping=None
    ),
    "gemma3": Case(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_GEMMA, "sliding_window": 5, "sliding_window_pattern": 3, "query_pre_attn_scalar": 24},
    ),
    "gemma3_scaled": Case(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_GEMMA,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": _BY_TYPE,
            "final_logit_softcapping": 2.0,
        },
    ),
    "phi3": _of("Phi3", _GQA, sliding_window=7),
    "phi3_partial": _of(
        "Phi3", _GQA, rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    ),
    "phi3_longrope_short": _of("Phi3", _GQA, original_max_position_embeddings=32, rope_parameters=_LONG),
    "phi3_longrope_long": _of("Phi3", _GQA, original_max_position_embeddings=8, rope_parameters=_LONG),
    "olmo": _of("Olmo", _GQA),
    "olmo2": _of("Olmo2", _GQA),
    "olmo2_biases": _of("Olmo2", _GQA, attention_bias=True),
    "granite": _of(
        "Granite",
        _GQA,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=2.5,
    ),
    "smollm3": _of("SmolLM3", _GQA, no_rope_layer_interval=2, tie_word_embeddings=True),
    "smollm3_windows": _of(
        "SmolLM3", _GQA, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=5, attention_bias=True
    ),
    "stablelm": _of("StableLm", _GQA),
    "stablelm_parallel": _of(
        "StableLm", _GQA, use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=True, partial_rotary_factor=0.5
    ),
    "gpt2": Case("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2_scales": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        {**_GPT2, "n_inner": 40, "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
    ),
    "gpt_neox": _of("GPTNeoX", _LM, tie_word_embeddings=False),
    "gpt_neox_sequential": _of(
        "GPTNeoX", _LM, tie_word_embeddings=False, use_parallel_residual=False, attention_bias=False, rotary_pct=0.5
    ),
    "opt": _of("OPT", _OPT),
    "opt_350m": _of("OPT", _OPT, do_layer_norm_before=False, word_embed_proj_dim=20),
    "opt_bare": _of("OPT", _OPT, enable_bias=False, layer_norm_elementwise_affine=False),
    "olmo_clipped": _of("Olmo", _GQA, clip_qkv=0.4),
    "olmo3": _of("Olmo3", _GQA, sliding_window=5, layer_types=_EVERY_OTHER),
    "olmo3_scaled": _of("Olmo3", _GQA, sliding_window=5, layer_types=_EVERY_OTHER, rope_parameters=_BY_TYPE),
    "cwm": _of("Cwm", _GQA, head_dim=16, sliding_window=5, **_LLAMA3),
    "ministral": _of("Ministral", _GQA, head_dim=8, sliding_window=5, layer_types=_EVERY_OTHER),
    "ministral3": _of(
        "Ministral3",
        _GQA,
        head_dim=16,
        **_rope("yarn", factor=4.0, original_max_position_embeddings=4, llama_4_scaling_beta=0.3),
    ),
    "vaultgemma": _of("VaultGemma", _GEMMA, sliding_window=5, query_pre_attn_scalar=24, attn_logit_softcapping=5.0),
    "hyperclovax": _of(
        "HyperCLOVAX",
        _GQA,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=0.4,
    ),
    "hyperclovax_plain": _of("HyperCLOVAX", _GQA, use_post_norm=False, attention_bias=True, mlp_bias=True),
    "phi": _of("Phi", _GQA),
    "phi_normed": _of("Phi", _LM, qk_layernorm=True, **_rope("default", partial_rotary_factor=0.25)),
    "starcoder2": _of("Starcoder2", _GQA, sliding_window=5),
    "starcoder2_plain": _of("Starcoder2", _GQA, use_bias=False),
    "falcon_7b": _of("Falcon", _FALCON),
    "falcon_40b": _of("Falcon", _FALCON, new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=False),
    "falcon_11b": _of(
        "Falcon", _FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, ffn_hidden_size=40
    ),
    "falcon_rw": _of("Falcon", _FALCON, alibi=True, bias=True, multi_query=False, parallel_attn=False),
    "bloom": _of("Bloom", _BLOOM),
    "bloom_six_heads": _of("Bloom", _BLOOM, hidden_size=48, n_head=6),
    "gptj": _of("GPTJ", _GPT2, rotary_dim=4),
    "gpt_neo": _of("GPTNeo", _NEO, window_size=5, attention_types=[[["global", "local", "local"], 1]]),
    "cohere": _of("Cohere", _GQA, tie_word_embeddings=True, logit_scale=0.7),
    "cohere_normed": _of("Cohere", _GQA, use_qk_norm=True, attention_bias=True, logit_scale=0.4),
    "cohere2": _of(
        "Cohere2", _GQA, sliding_window=5, layer_types=_EVERY_OTHER, tie_word_embeddings=True, logit_scale=0.7
    ),
    "glm": _of("Glm", _GQA, head_dim=16),
    "glm4": _of("Glm4", _GQA, head_dim=16, attention_bias=False),
    "exaone4": _of("Exaone4", _GQA, sliding_window=5, sliding_window_pattern=2),
    "exaone4_global": _of("Exaone4", _GQA, sliding_window=None, layer_types=["full_attention"] * 3),
    "nemotron": _of("Nemotron", _GQA, head_dim=16),
    "nemotron_biases": _of("Nemotron", _GQA, attention_bias=True, mlp_bias=True),
    "jais2": _of("Jais2", _GQA),
    "arcee": _of("Arcee", _GQA, mlp_bias=True, attention_bias=True),
    "apertus": _of("Apertus", _GQA, **_LLAMA3),
    "hunyuan": _of("HunYuanDenseV1", _GQA, head_dim=16),
    "hunyuan_alpha": _of("HunYuanDenseV1", _GQA, head_dim=16, **_rope("dynamic", factor=1.0, alpha=50.0)),
    "ernie4_5": _of("Ernie4_5", _GQA, head_dim=16, use_bias=True),
    "helium": _of("Helium", _GQA, head_dim=8, attention_bias=True),
    "seed_oss": _of("SeedOss", _GQA, head_dim=16, attention_out_bias=True),
    "gpt_bigcode": _of("GPTBigCode", _GPT2),
    "gpt_bigcode_heads": _of("GPTBigCode", _GPT2, multi_query=False, scale_attn_weights=False),
    "mpt": _of("Mpt", _MPT),
    "mpt_clipped": _of("Mpt", _MPT, n_heads=2, attn_config={"clip_qkv": 0.4, "softmax_scale": 0.3}),
    "mpt_six_heads": _of("Mpt", _MPT, d_model=48, n_heads=6),
    "persimmon": _of("Persimmon", _LM),
    "persimmon_plain": _of("Persimmon", _LM, qk_layernorm=False, hidden_act="gelu"),
}

_LFM2 = {**_GQA, "block_multiple_of": 8, "tie_word_embeddings": True}
DECODERS |= {
    "lfm2": _of("Lfm2", _LFM2, layer_types=["conv", "full_attention", "conv"]),
    "lfm2_wide": _of("Lfm2", _LFM2, full_attn_idxs=[0], conv_L_cache=4, block_auto_adjust_ff_dim=False),
}
_IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_IMAGES_QWEN = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 20, "patch_size": 4}


def _sees(name: str, text: Mapping[str, Any], images: Mapping[str, Any], **fields: Any) -> Case:
    own = {"text_config": text, "vision_config": images, "eos_token_id": None}
    return Case(f"{name}ForConditionalGeneration", f"{name}Config", {**own, **fields})


DECODERS |= {
    "llava": _sees("Llava", {**_GQA, "model_type": "llama"}, {**_IMAGES, "model_type": "clip_vision_model"}),
    "gemma3_images": _sees(
        "Gemma3",
        {**_GEMMA, "sliding_window": 5, "sliding_window_pattern": 3},
        {**_IMAGES, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
    ),
    "qwen2_vl": _sees(
        "Qwen2VL",
        {**_GQA, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [1, 1, 2]}},
        {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    ),
    "qwen2_5_vl": _sees(
        "Qwen2_5_VL",
        {**_GQA, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [1, 1, 2]}},
        {**_IMAGES_QWEN, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
        tie_word_embeddings=True,
    ),
    "qwen3_vl": _sees(
        "Qwen3VL",
        {
            **_GQA,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            },
        },
        {**_IMAGES_QWEN, "out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "mistral3": _sees(
        "Mistral3",
        {**_GQA, "model_type": "mistral", "sliding_window": 5},
        {**_IMAGES, "model_type": "pixtral", "head_dim": 8},
        tie_word_embeddings=False,
    ),
    "internvl": _sees(
        "InternVL",
        {**_GQA, "model_type": "qwen2"},
        {**_IMAGES, "image_size": [8, 8], "patch_size": [4, 4]},
        tie_word_embeddings=False,
    ),
    "llava_next": _sees("LlavaNext", {**_GQA, "model_type": "llama"}, {**_IMAGES, "model_type": "clip_vision_model"}),
    "idefics3": _sees("Idefics3", {**_GQA, "model_type": "llama"}, _IMAGES),
    "smolvlm": _sees("SmolVLM", {**_GQA, "model_type": "llama"}, _IMAGES, tie_word_embeddings=True),
}

_MIXTURE = {**_GQA, "num_hidden_layers": 2, "num_experts_per_tok": 2}
_DEEPSEEK = {
    **_MIXTURE,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.3)
_NARROW = {"num_experts": 5, "moe_intermediate_size": 24}

MIXTURES: dict[str, Case] = {
    "mixtral": _of("Mixtral", _MIXTURE, num_local_experts=5),
    "mixtral_window": _of("Mixtral", _MIXTURE, num_local_experts=3, sliding_window=5),
    "qwen2_moe": _of("Qwen2Moe", _MIXTURE, **_NARROW, shared_expert_intermediate_size=40),
    "qwen2_moe_some_dense": _of(
        "Qwen2Moe",
        {**_MIXTURE, "num_hidden_layers": 3},
        **_NARROW,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[0],
        norm_topk_prob=True,
        qkv_bias=False,
    ),
    "qwen3_moe": _of("Qwen3Moe", _MIXTURE, **_NARROW, head_dim=16, norm_topk_prob=True),
    "olmoe": _of("Olmoe", _MIXTURE, num_experts=6),
    "granitemoe": _of(
        "GraniteMoe",
        _MIXTURE,
        num_local_experts=5,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=2.5,
    ),
    "granitemoeshared": _of("GraniteMoeShared", _MIXTURE, num_local_experts=4, shared_intermediate_size=20),
    "gpt_oss": _of("GptOss", _MIXTURE, num_local_experts=5, head_dim=16, sliding_window=5, swiglu_limit=0.4, **_YARN),
    "deepseek_v2": _of("DeepseekV2", _DEEPSEEK),
    "deepseek_v2_groups": _of(
        "DeepseekV2",
        _DEEPSEEK,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        q_lora_rank=None,
        routed_scaling_factor=1.7,
        **_YARN,
    ),
    "deepseek_v3": _of("DeepseekV3", _DEEPSEEK, n_group=4, topk_group=2, **_YARN),
    "deepseek_v3_halves": _of("DeepseekV3", _DEEPSEEK, n_group=1, topk_group=1, rope_interleave=False),
    "glm4_moe": _of(
        "Glm4Moe",
        _MIXTURE,
        n_routed_experts=6,
        moe_intermediate_size=24,
        head_dim=16,
        use_qk_norm=True,
        attention_bias=True,
        routed_scaling_factor=1.5,
    ),
    "ernie4_5_moe": _of("Ernie4_5_Moe", _MIXTURE, moe_num_experts=6, moe_k=2, moe_intermediate_size=24),
}
DECODERS |= MIXTURES

ENCODERS: dict[str, Case] = {
    "bert_sequence": Case("BertForSequenceClassification", "BertConfig", _BERT),
    "bert_token": Case("BertForTokenClassification", "BertConfig", {**_BERT, "hidden_act": "gelu_new"}),
    "bert_sentence": Case("BertModel", "BertConfig", _BERT),
    "roberta_sequence": Case("RobertaForSequenceClassification", "RobertaConfig", {**_BERT, "pad_token_id": 1}),
    "roberta_token": Case("RobertaForTokenClassification", "RobertaConfig", {**_BERT, "pad_token_id": 3}),
    "roberta_sentence": Case("RobertaModel", "RobertaConfig", {**_BERT, "pad_token_id": 1}),
    "xlm_roberta_sequence": Case(
        "XLMRobertaForSequenceClassification", "XLMRobertaConfig", {**_BERT, "pad_token_id": 1}
    ),
    "xlm_roberta_token": Case("XLMRobertaForTokenClassification", "XLMRobertaConfig", {**_BERT, "pad_token_id": 1}),
    "xlm_roberta_sentence": Case("XLMRobertaModel", "XLMRobertaConfig", {**_BERT, "pad_token_id": 1}),
    "xlm_roberta_mask": Case("XLMRobertaForMaskedLM", "XLMRobertaConfig", {**_BERT, "pad_token_id": 1}),
    "camembert_sequence": Case("CamembertForSequenceClassification", "CamembertConfig", {**_BERT, "pad_token_id": 1}),
    "camembert_mask": Case("CamembertForMaskedLM", "CamembertConfig", {**_BERT, "pad_token_id": 1}),
    "camembert_token": Case("CamembertForTokenClassification", "CamembertConfig", {**_BERT, "pad_token_id": 1}),
    "distilbert_sequence": Case("DistilBertForSequenceClassification", "DistilBertConfig", _DISTIL),
    "distilbert_token": Case("DistilBertForTokenClassification", "DistilBertConfig", _DISTIL),
    "distilbert_sentence": Case("DistilBertModel", "DistilBertConfig", _DISTIL),
    "electra_sequence": Case("ElectraForSequenceClassification", "ElectraConfig", {**_BERT, "embedding_size": 20}),
    "electra_token": Case("ElectraForTokenClassification", "ElectraConfig", {**_BERT, "embedding_size": 32}),
    "electra_sentence": Case("ElectraModel", "ElectraConfig", {**_BERT, "embedding_size": 20}),
    "albert_sequence": Case("AlbertForSequenceClassification", "AlbertConfig", {**_BERT, "embedding_size": 20}),
    "albert_token": Case(
        "AlbertForTokenClassification",
        "AlbertConfig",
        {**_BERT, "embedding_size": 20, "num_hidden_groups": 2, "inner_group_num": 2},
    ),
    "albert_sentence": Case("AlbertModel", "AlbertConfig", {**_BERT, "embedding_size": 32, "hidden_act": "gelu"}),
    "mpnet_sequence": Case("MPNetForSequenceClassification", "MPNetConfig", _MPNET),
    "mpnet_token": Case("MPNetForTokenClassification", "MPNetConfig", _MPNET),
    "mpnet_sentence": Case("MPNetModel", "MPNetConfig", _MPNET),
    "deberta_v2_sequence": Case("DebertaV2ForSequenceClassification", "DebertaV2Config", _DEBERTA),
    "deberta_v2_token": Case(
        "DebertaV2ForTokenClassification",
        "DebertaV2Config",
        {
            **_DEBERTA,
            "share_att_key": False,
            "position_biased_input": True,
            "embedding_size": 20,
            "conv_kernel_size": 3,
            "conv_act": "gelu",
            "pos_att_type": "p2c|c2p",
            "type_vocab_size": 2,
        },
    ),
    "deberta_v2_sentence": Case(
        "DebertaV2Model",
        "DebertaV2Config",
        {
            **_DEBERTA,
            "position_buckets": -1,
            "max_relative_positions": 5,
            "pos_att_type": ["c2p"],
            "norm_rel_ebd": "none",
        },
    ),
    "deberta_v2_positions_to_contents": Case(
        "DebertaV2Model",
        "DebertaV2Config",
        {**_DEBERTA, "pos_att_type": ["p2c"], "share_att_key": False, "conv_kernel_size": 5, "conv_groups": 4},
    ),
    "deberta_v2_absolute": Case(
        "DebertaV2Model", "DebertaV2Config", {**_DEBERTA, "relative_attention": False, "position_biased_input": True}
    ),
    "deberta_sequence": Case("DebertaForSequenceClassification", "DebertaConfig", _DEBERTA_1),
    "deberta_token": Case(
        "DebertaForTokenClassification",
        "DebertaConfig",
        {**_DEBERTA_1, "pos_att_type": "c2p", "norm_rel_ebd": "layer_norm"},
    ),
    "deberta_sentence": Case("DebertaModel", "DebertaConfig", {**_DEBERTA_1, "max_relative_positions": 5}),
    "deberta_mask": Case("DebertaForMaskedLM", "DebertaConfig", {**_DEBERTA_1, "pos_att_type": ["p2c"]}),
    "deberta_v2_mask": Case("DebertaV2ForMaskedLM", "DebertaV2Config", {**_DEBERTA, "embedding_size": 20}),
    "deberta_v3_mask": Case("DebertaV2ForMaskedLM", "DebertaV2Config", {**_DEBERTA, "legacy": False}),
    "modernbert_sequence": Case("ModernBertForSequenceClassification", "ModernBertConfig", _MODERN),
    "modernbert_mean": Case(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**_MODERN, "classifier_pooling": "mean", "classifier_bias": True, "norm_bias": True, "mlp_bias": True},
    ),
    "modernbert_token": Case(
        "ModernBertForTokenClassification",
        "ModernBertConfig",
        {**_MODERN, "attention_bias": True, "local_attention": 7},
    ),
    "modernbert_sentence": Case(
        "ModernBertModel",
        "ModernBertConfig",
        {
            **_MODERN,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "modernbert_mask": Case("ModernBertForMaskedLM", "ModernBertConfig", _MODERN),
    "modernbert_mask_untied": Case(
        "ModernBertForMaskedLM", "ModernBertConfig", {**_MODERN, "tie_word_embeddings": False, "decoder_bias": False}
    ),
    "nomic_bert_sequence": Case("NomicBertForSequenceClassification", "NomicBertConfig", _BERT),
    "nomic_bert_token": Case("NomicBertForTokenClassification", "NomicBertConfig", {**_BERT, "hidden_act": "gelu"}),
    "nomic_bert_sentence": Case("NomicBertModel", "NomicBertConfig", {**_BERT, **_rope("linear", factor=2.5)}),
    "nomic_bert_mask": Case("NomicBertForMaskedLM", "NomicBertConfig", _BERT),
    "jina_v3_sequence": Case("JinaEmbeddingsV3ForSequenceClassification", "JinaEmbeddingsV3Config", _JINA),
    "jina_v3_token": Case("JinaEmbeddingsV3ForTokenClassification", "JinaEmbeddingsV3Config", _JINA),
    "jina_v3_sentence": Case("JinaEmbeddingsV3Model", "JinaEmbeddingsV3Config", {**_JINA, "type_vocab_size": 2}),
    "jina_v3_mask": Case("JinaEmbeddingsV3ForMaskedLM", "JinaEmbeddingsV3Config", _JINA),
    "eurobert_late": Case("EuroBertForSequenceClassification", "EuroBertConfig", _EURO),
    "eurobert_mean": Case(
        "EuroBertForSequenceClassification", "EuroBertConfig", {**_EURO, "classifier_pooling": "mean"}
    ),
    "eurobert_first": Case(
        "EuroBertForSequenceClassification", "EuroBertConfig", {**_EURO, "classifier_pooling": "bos"}
    ),
    "eurobert_token": Case("EuroBertForTokenClassification", "EuroBertConfig", {**_EURO, "attention_bias": True}),
    "eurobert_sentence": Case("EuroBertModel", "EuroBertConfig", {**_EURO, "head_dim": 12}),
    "eurobert_mask": Case("EuroBertForMaskedLM", "EuroBertConfig", {**_EURO, "mlp_bias": True}),
    "gte_sequence": Case("GteForSequenceClassification", "GteConfig", _BERT),
    "gte_token": Case("GteForTokenClassification", "GteConfig", {**_BERT, "type_vocab_size": 0}),
    "gte_sentence": Case("GteModel", "GteConfig", {**_BERT, "type_vocab_size": 1}),
    "gte_mask": Case("GteForMaskedLM", "GteConfig", {**_BERT, "hidden_act": "gelu_new"}),
    "t5_encoder": Case("T5EncoderModel", "T5Config", _T5),
    "t5_encoder_gated": Case("T5EncoderModel", "T5Config", {**_T5, "feed_forward_proj": "gated-gelu", "d_kv": 12}),
    "mt5_encoder": Case("MT5EncoderModel", "MT5Config", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "umt5_encoder": Case("UMT5EncoderModel", "UMT5Config", {**_T5, "feed_forward_proj": "gated-gelu"}),
}


_BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 48,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_GATED = {**_T5, "feed_forward_proj": "gated-gelu"}
_WHISPER = {
    **{key: value for key, value in _BART.items() if key != "max_position_embeddings"},
    "max_source_positions": 12,
    "max_target_positions": 40,
    "num_mel_bins": 5,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}

PAIRS: dict[str, Case] = {
    "t5": Case("T5ForConditionalGeneration", "T5Config", {**_T5, "num_layers": 3, "num_decoder_layers": 2}),
    "t5_flan": Case("T5ForConditionalGeneration", "T5Config", {**_GATED, "d_kv": 12, "tie_word_embeddings": False}),
    "mt5": Case("MT5ForConditionalGeneration", "MT5Config", _GATED),
    "umt5": Case("UMT5ForConditionalGeneration", "UMT5Config", _GATED),
    "bart": Case("BartForConditionalGeneration", "BartConfig", _BART),
    "bart_scaled": Case(
        "BartForConditionalGeneration", "BartConfig", {**_BART, "scale_embedding": True, "activation_function": "relu"}
    ),
    "mbart": Case("MBartForConditionalGeneration", "MBartConfig", {**_BART, "scale_embedding": True}),
    "marian": Case("MarianMTModel", "MarianConfig", {**_BART, "scale_embedding": True, "activation_function": "swish"}),
    "pegasus": Case("PegasusForConditionalGeneration", "PegasusConfig", {**_BART, "scale_embedding": True}),
    "whisper": Case("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
}
_OWN_HEAD = {"t5_flan"}


def _for(name: str, fields: Mapping[str, Any], ending: str, **more: Any) -> Case:
    return Case(f"{name}{ending}", f"{name}Config", {**fields, **more})


_NARROW = {"do_layer_norm_before": False, "word_embed_proj_dim": 20}
_CLASSIFIED = {"num_labels": 3, "pad_token_id": 4}
HEADS: dict[str, Case] = {
    "llama_classifier": _for("Llama", {**_GQA, **_CLASSIFIED}, "ForSequenceClassification"),
    "llama_tokens": _for("Llama", {**_GQA, **_CLASSIFIED}, "ForTokenClassification"),
    "llama_spans": _for("Llama", _GQA, "ForQuestionAnswering"),
    "llama_bare": _for("Llama", _GQA, "Model"),
    "qwen3_classifier": _for("Qwen3", {**_GQA, **_CLASSIFIED, "head_dim": 16}, "ForSequenceClassification"),
    "qwen3_spans": _for("Qwen3", {**_GQA, "head_dim": 16}, "ForQuestionAnswering"),
    "mistral_classifier": _for(
        "Mistral", {**_GQA, **_CLASSIFIED}, "ForSequenceClassification", sliding_window=5, num_labels=1
    ),
    "gemma2_classifier": _for("Gemma2", {**_GEMMA, **_CLASSIFIED}, "ForSequenceClassification", sliding_window=5),
    "gemma3_classifier": Case(
        "Gemma3TextForSequenceClassification",
        "Gemma3TextConfig",
        {**_GEMMA, **_CLASSIFIED, "sliding_window": 5, "sliding_window_pattern": 3},
    ),
    "gpt_oss_classifier": _for(
        "GptOss",
        {**_MIXTURE, **_CLASSIFIED, **_YARN},
        "ForSequenceClassification",
        num_local_experts=5,
        head_dim=16,
        sliding_window=5,
    ),
    "bloom_classifier": Case("BloomForSequenceClassification", "BloomConfig", {**_BLOOM, **_CLASSIFIED}),
    "falcon_tokens": Case("FalconForTokenClassification", "FalconConfig", {**_FALCON, **_CLASSIFIED}),
    "gptj_spans": Case("GPTJForQuestionAnswering", "GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "phi_classifier": _for("Phi", {**_GQA, **_CLASSIFIED}, "ForSequenceClassification"),
    "nemotron_tokens": _for("Nemotron", {**_GQA, **_CLASSIFIED}, "ForTokenClassification", head_dim=16),
    "lfm2_bare": _for("Lfm2", {**_LFM2, "layer_types": ["conv", "full_attention", "conv"]}, "Model"),
    "gpt2_classifier": Case("GPT2ForSequenceClassification", "GPT2Config", {**_GPT2, **_CLASSIFIED}),
    "gpt2_tokens": Case("GPT2ForTokenClassification", "GPT2Config", {**_GPT2, **_CLASSIFIED}),
    "gpt2_spans": Case("GPT2ForQuestionAnswering", "GPT2Config", _GPT2),
    "gpt_neox_tokens": _for("GPTNeoX", {**_LM, **_CLASSIFIED}, "ForTokenClassification"),
    "opt_classifier": _for("OPT", {**_OPT, **_CLASSIFIED}, "ForSequenceClassification"),
    "opt_350m_classifier": _for("OPT", {**_OPT, **_CLASSIFIED, **_NARROW}, "ForSequenceClassification"),
    "bert_spans": Case("BertForQuestionAnswering", "BertConfig", {**_BERT, "num_labels": 2}),
    "bert_masks": Case("BertForMaskedLM", "BertConfig", _BERT),
    "bert_masks_untied": Case("BertForMaskedLM", "BertConfig", {**_BERT, "tie_word_embeddings": False}),
    "bert_choices": Case("BertForMultipleChoice", "BertConfig", _BERT),
    "roberta_spans": Case(
        "RobertaForQuestionAnswering", "RobertaConfig", {**_BERT, "pad_token_id": 1, "num_labels": 2}
    ),
    "roberta_masks": Case("RobertaForMaskedLM", "RobertaConfig", {**_BERT, "pad_token_id": 1}),
    "roberta_choices": Case("RobertaForMultipleChoice", "RobertaConfig", {**_BERT, "pad_token_id": 1}),
    "distilbert_spans": Case("DistilBertForQuestionAnswering", "DistilBertConfig", {**_DISTIL, "num_labels": 2}),
    "distilbert_masks": Case("DistilBertForMaskedLM", "DistilBertConfig", _DISTIL),
    "albert_spans": Case(
        "AlbertForQuestionAnswering", "AlbertConfig", {**_BERT, "embedding_size": 20, "num_labels": 2}
    ),
    "albert_masks": Case("AlbertForMaskedLM", "AlbertConfig", {**_BERT, "embedding_size": 20}),
    "albert_choices": Case("AlbertForMultipleChoice", "AlbertConfig", {**_BERT, "embedding_size": 20}),
    "electra_spans": Case(
        "ElectraForQuestionAnswering", "ElectraConfig", {**_BERT, "embedding_size": 20, "num_labels": 2}
    ),
    "electra_masks": Case("ElectraForMaskedLM", "ElectraConfig", {**_BERT, "embedding_size": 20}),
    "mpnet_spans": Case("MPNetForQuestionAnswering", "MPNetConfig", {**_MPNET, "num_labels": 2}),
    "mpnet_masks": Case("MPNetForMaskedLM", "MPNetConfig", _MPNET),
    "mpnet_choices": Case("MPNetForMultipleChoice", "MPNetConfig", _MPNET),
    "deberta_choices": Case("DebertaV2ForMultipleChoice", "DebertaV2Config", _DEBERTA),
    "deberta_span": Case("DebertaV2ForQuestionAnswering", "DebertaV2Config", {**_DEBERTA, "num_labels": 2}),
    "electra_choices": Case("ElectraForMultipleChoice", "ElectraConfig", {**_BERT, "embedding_size": 20}),
    "modernbert_choices": Case("ModernBertForMultipleChoice", "ModernBertConfig", _MODERN),
    "modernbert_choices_mean": Case(
        "ModernBertForMultipleChoice", "ModernBertConfig", {**_MODERN, "classifier_pooling": "mean"}
    ),
    "modernbert_span": Case("ModernBertForQuestionAnswering", "ModernBertConfig", {**_MODERN, "num_labels": 2}),
    "jina_v3_span": Case("JinaEmbeddingsV3ForQuestionAnswering", "JinaEmbeddingsV3Config", {**_JINA, "num_labels": 2}),
    "distilbert_choices": Case("DistilBertForMultipleChoice", "DistilBertConfig", _DISTIL),
}
"""Heads for tasks other than those above."""


_IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 3,
}
_TEXT_TOWER = {**{key: _IMAGE[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}}
_TEXT_TOWER |= {"num_attention_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 16, "projection_dim": 12}
_SIGLIP_TEXT = {key: value for key, value in _TEXT_TOWER.items() if key != "projection_dim"}

IMAGES: dict[str, Case] = {
    "vit_classifier": Case("ViTForImageClassification", "ViTConfig", _IMAGE),
    "vit_bare": Case("ViTModel", "ViTConfig", {**_IMAGE, "qkv_bias": False, "pooler_output_size": 20}),
    "vit_wide": Case("ViTForImageClassification", "ViTConfig", {**_IMAGE, "image_size": [8, 16], "patch_size": [4, 8]}),
    "dinov2_classifier": Case("Dinov2ForImageClassification", "Dinov2Config", {**_IMAGE, "mlp_ratio": 2}),
    "dinov2_bare_swiglu": Case("Dinov2Model", "Dinov2Config", {**_IMAGE, "mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov2_registers": Case(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {**_IMAGE, "mlp_ratio": 2}
    ),
    "clip_vision": Case("CLIPVisionModel", "CLIPVisionConfig", _IMAGE),
    "clip_vision_projected": Case(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", {**_IMAGE, "projection_dim": 12}
    ),
    "clip_classifier": Case(
        "CLIPForImageClassification",
        "CLIPConfig",
        {"vision_config": _IMAGE, "text_config": _TEXT_TOWER, "num_labels": 5},
    ),
    "siglip_vision": Case("SiglipVisionModel", "SiglipVisionConfig", _IMAGE),
    "siglip_classifier": Case(
        "SiglipForImageClassification", "SiglipConfig", {"vision_config": _IMAGE, "text_config": _SIGLIP_TEXT}
    ),
}
TOWERS: dict[str, Case] = {
    "clip_text": Case("CLIPTextModel", "CLIPTextConfig", {**_TEXT_TOWER, "eos_token_id": 7}),
    "clip_text_projected": Case("CLIPTextModelWithProjection", "CLIPTextConfig", {**_TEXT_TOWER, "eos_token_id": 7}),
    "clip_text_old_end": Case("CLIPTextModelWithProjection", "CLIPTextConfig", {**_TEXT_TOWER, "eos_token_id": 2}),
    "siglip_text": Case("SiglipTextModel", "SiglipTextConfig", {**_SIGLIP_TEXT, "projection_size": 20}),
}


def build(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """Write the random checkpoint `name` into `folder`, some fields of its configuration replaced."""
    model = made(name, **fields)
    model.to(dtype).save_pretrained(folder)
    return folder


def made(name: str, **fields: Any) -> Any:
    """The random model `name`, some fields of its configuration replaced."""
    case = {**DECODERS, **ENCODERS, **HEADS, **PAIRS, **IMAGES, **TOWERS}[name]
    config = getattr(transformers, case.config)(**{**case.fields, **fields})
    model = getattr(transformers, case.cls)(config)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    centred = 0.0 if "gemma" in name or "nemotron" in name else 1.0  # the gain of these is 1 + g
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 or key.endswith("bias"):
            value = 0.2 * noise
        else:
            value = centred + 0.3 * noise
        parameter.data.copy_(value)
    if name in _OWN_HEAD:
        model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn(model.lm_head.weight.shape, generator=generator))
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.copy_(torch.randn(model.final_logits_bias.shape, generator=generator))
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


def load(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of `folder` as transformers loads it, strictly, with attention spelt out.

    Spelt out, Falcon adds its bias on the scores twice: with the mask and beside it.
    """
    case = {**DECODERS, **ENCODERS, **HEADS, **PAIRS, **IMAGES, **TOWERS}[name]
    model, info = getattr(transformers, case.cls).from_pretrained(
        folder, dtype=dtype, output_loading_info=True, attn_implementation="sdpa" if name == "falcon_rw" else "eager"
    )
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise AssertionError(f"{name}: the checkpoint does not load cleanly: {wrong}")
    return model.eval()
