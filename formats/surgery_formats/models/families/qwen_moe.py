# SPDX-License-Identifier: Apache-2.0
"""Qwen-MoE and models with its names: gate_proj, up_proj, down_proj per expert on disk, fused in transformers 5."""

from surgery_formats.models.families.family import Family, Fused

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
    fused=(
        Fused("experts.gate_up_proj", ("experts.{e}.gate_proj.weight", "experts.{e}.up_proj.weight")),
        Fused("experts.down_proj", ("experts.{e}.down_proj.weight",)),
        Fused("switch_mlp.gate_proj.weight", ("experts.{e}.gate_proj.weight",)),  # as MLX stacks them
        Fused("switch_mlp.up_proj.weight", ("experts.{e}.up_proj.weight",)),
        Fused("switch_mlp.down_proj.weight", ("experts.{e}.down_proj.weight",)),
    ),
)
