# SPDX-License-Identifier: Apache-2.0
"""GLM-4-9B (1) and GLM-4-0414 (4, with norms behind the branches): half of each head rotated in neighbouring pairs."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, fused_gated_mlp, llama_named, rms_norms
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Branch, Layer, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["GLM", "GLM4"]


def glm(settings: ModelSettings) -> Model:
    """GLM-4-9B (arXiv:2406.12793): half of each head rotated in neighbouring pairs."""
    return _recipe(settings, after=False)


def glm4(settings: ModelSettings) -> Model:
    """GLM-4-0414: as GLM-4-9B, with norms behind the branches."""
    return _recipe(settings, after=True)


def _recipe(settings: ModelSettings, *, after: bool) -> Model:
    sizes = read_sizes(
        settings,
        vocabulary=151552,
        max_positions=131072,
        kv_heads=2,
        head_dim=128,
        inner=13696,
        layers=40,
    )
    rope = read_rope(settings, sizes, partial=0.5, interleaved=True)
    norm = rms_norms(settings, 0.00000015625)
    bias = settings.flag("attention_bias", default=True)
    activation = settings.activation("hidden_act", default="silu")

    def layer(at: str, index: int) -> Layer:
        attended, transformed = (
            norm(f"{at}.post_{name}_layernorm") if after else None for name in ("self_attn", "mlp")
        )
        return Layer(
            attention(f"{at}.self_attn", sizes, rope, bias=bias, output_bias=False),
            Branch(norm(f"{at}.input_layernorm"), attended),
            fused_gated_mlp(f"{at}.mlp", sizes, activation),
            Branch(norm(f"{at}.post_attention_layernorm"), transformed),
        )

    return llama_named(settings, sizes, layer, norm)


GLM = Family(names=("glm",), embedding="model.embed_tokens", head="lm_head", recipe=glm)
GLM4 = Family(names=("glm4",), embedding="model.embed_tokens", head="lm_head", recipe=glm4)
