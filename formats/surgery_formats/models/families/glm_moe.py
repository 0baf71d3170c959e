# SPDX-License-Identifier: Apache-2.0
"""GLM 4.5 with experts."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, llama_layer, llama_named, rms_norms
from surgery_formats.models.families.deepseek import further_layers, sigmoid_experts
from surgery_formats.models.families.family import Family, fused_experts
from surgery_formats.models.families.recipe import Attention, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """GLM 4.5: DeepSeek 3's experts with grouped-query attention, rotary positions on half a head (arXiv:2508.06471)."""
    sizes = read_sizes(
        settings,
        vocabulary=151552,
        max_positions=131072,
        hidden=4096,
        inner=10944,
        layers=46,
        heads=96,
        kv_heads=8,
    )
    rope, norm = read_rope(settings, sizes, partial=0.5), rms_norms(settings, 1e-5)
    bias, normed = settings.flag("attention_bias", default=False), settings.flag("use_qk_norm", default=False)

    def attend(at: str, index: int) -> Attention:
        q_norm, k_norm = (norm(f"{at}.{name}_norm") if normed else None for name in "qk")
        return attention(at, sizes, rope, bias=bias, output_bias=False, q_norm=q_norm, k_norm=k_norm)

    default = {"experts": 128, "inner": 1408, "shared": 1, "dense": 1, "top": 8, "groups": 1, "best": 1}
    transform = sigmoid_experts(settings, sizes, default, scale=1.0)
    layer = llama_layer(settings, sizes, attend, norm, transform=transform)
    return llama_named(settings, sizes, layer, norm, further_layers=further_layers(settings))


FAMILY = Family(
    names=("glm4_moe",),
    embedding="model.embed_tokens",
    head="lm_head",
    fused=fused_experts("gate_proj", "up_proj", "down_proj"),
    recipe=recipe,
)
