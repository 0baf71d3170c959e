# SPDX-License-Identifier: Apache-2.0
"""Seed-OSS: Llama with biases on q, k and v, and on the output by a setting of its own."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, llama_layer, llama_named, rms_norms
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """Seed-OSS-36B: biases on q, k and v."""
    sizes = read_sizes(
        settings,
        vocabulary=155136,
        max_positions=524288,
        kv_heads=8,
        head_dim=128,
        inner=27648,
        layers=64,
        heads=80,
    )
    rope, norm = read_rope(settings, sizes), rms_norms(settings)
    bias = settings.flag("attention_bias", default=True)
    output_bias = settings.flag("attention_out_bias", default=False)

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=bias, output_bias=output_bias)

    layer = llama_layer(settings, sizes, attend, norm, mlp_bias=settings.flag("mlp_bias", default=False))
    return llama_named(settings, sizes, layer, norm)


FAMILY = Family(names=("seed_oss",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
