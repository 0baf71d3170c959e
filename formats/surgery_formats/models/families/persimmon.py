# SPDX-License-Identifier: Apache-2.0
"""Persimmon: q, k and v interleaved by head, their layer norms, half of each head rotated, squared ReLU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from surgery_formats.models.families.decoder import fused_attention, layer_norm, llama_named, plain_mlp, pre_norm
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Layer, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """Adept 2023, *Persimmon-8B*: q, k and v interleaved by head, half of each head rotated, squared ReLU."""
    sizes = read_sizes(
        settings,
        vocabulary=262144,
        max_positions=16384,
        inner=16384,
        layers=36,
        heads=64,
        grouped=False,
    )
    rope = read_rope(settings, sizes, partial=0.5)
    norm = partial(layer_norm, epsilon=settings.positive("layer_norm_eps", default=1e-5))
    normed = settings.flag("qk_layernorm", default=True)
    activation = settings.activation("hidden_act", default="relu2")

    def layer(at: str, index: int) -> Layer:
        own = f"{at}.self_attn"
        q_norm, k_norm = (norm(f"{own}.{which}_layernorm") if normed else None for which in "qk")
        attend = fused_attention(
            f"{own}.query_key_value", f"{own}.dense", sizes, layout="by_head", rope=rope, bias=True
        )
        return Layer(
            replace(attend, q_norm=q_norm, k_norm=k_norm),
            pre_norm(norm(f"{at}.input_layernorm")),
            plain_mlp(f"{at}.mlp.dense_h_to_4h", f"{at}.mlp.dense_4h_to_h", sizes, activation),
            pre_norm(norm(f"{at}.post_attention_layernorm")),
        )

    return llama_named(settings, sizes, layer, norm, final_name="final_layernorm")


FAMILY = Family(names=("persimmon",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
