# SPDX-License-Identifier: Apache-2.0
"""Decoders with mixtures of experts."""

from __future__ import annotations

from tests.oracles.recipes_fields import MIXTURE, YARN, Case, case_of

__all__ = ["MIXTURES"]

_DEEPSEEK = {
    **MIXTURE,
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
_NARROW = {"num_experts": 5, "moe_intermediate_size": 24}

MIXTURES: dict[str, Case] = {
    "mixtral": case_of("Mixtral", MIXTURE, num_local_experts=5),
    "mixtral_window": case_of("Mixtral", MIXTURE, num_local_experts=3, sliding_window=5),
    "qwen2_moe": case_of("Qwen2Moe", MIXTURE, **_NARROW, shared_expert_intermediate_size=40),
    "qwen2_moe_some_dense": case_of(
        "Qwen2Moe",
        {**MIXTURE, "num_hidden_layers": 3},
        **_NARROW,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[0],
        norm_topk_prob=True,
        qkv_bias=False,
    ),
    "qwen3_moe": case_of("Qwen3Moe", MIXTURE, **_NARROW, head_dim=16, norm_topk_prob=True),
    "olmoe": case_of("Olmoe", MIXTURE, num_experts=6),
    "granitemoe": case_of(
        "GraniteMoe",
        MIXTURE,
        num_local_experts=5,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=2.5,
    ),
    "granitemoeshared": case_of("GraniteMoeShared", MIXTURE, num_local_experts=4, shared_intermediate_size=20),
    "gpt_oss": case_of("GptOss", MIXTURE, num_local_experts=5, head_dim=16, sliding_window=5, swiglu_limit=0.4, **YARN),
    "deepseek_v2": case_of("DeepseekV2", _DEEPSEEK),
    "deepseek_v2_groups": case_of(
        "DeepseekV2",
        _DEEPSEEK,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,  # of two, the groups of the greatest would hold both: limited or not, the same
        q_lora_rank=None,
        routed_scaling_factor=1.7,
        **YARN,
    ),
    "deepseek_v3": case_of("DeepseekV3", _DEEPSEEK, n_group=4, topk_group=2, **YARN),
    "deepseek_v3_halves": case_of("DeepseekV3", _DEEPSEEK, n_group=1, topk_group=1, rope_interleave=False),
    "glm4_moe": case_of(
        "Glm4Moe",
        MIXTURE,
        n_routed_experts=6,
        moe_intermediate_size=24,
        head_dim=16,
        use_qk_norm=True,
        attention_bias=True,
        routed_scaling_factor=1.5,
    ),
    "ernie4_5_moe": case_of("Ernie4_5_Moe", MIXTURE, moe_num_experts=6, moe_k=2, moe_intermediate_size=24),
}
