# SPDX-License-Identifier: Apache-2.0
"""Qwen-MoE and models with its names: gate_proj, up_proj, down_proj per expert on disk, fused in transformers 5."""

from surgery_formats.models.families.family import Family, fused_experts

__all__ = ["FAMILY"]

FAMILY = Family(
    names=(
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
        "deepseek_v2",
        "deepseek_v3",
        "dots1",
        "ernie4_5_moe",
        "glm4_moe",
        "flex_olmo",
        "hunyuan_v1_moe",
        "jamba",
        "longcat_flash",
        "exaone_moe",
        "cohere2_moe",
    ),
    embedding="model.embed_tokens",
    head="lm_head",
    fused=fused_experts("gate_proj", "up_proj", "down_proj"),
)
