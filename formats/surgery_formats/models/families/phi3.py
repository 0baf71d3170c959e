# SPDX-License-Identifier: Apache-2.0
"""Phi-3 and Phi-4: q, k, v in one projection, gate and up in another, both in memory and on disk."""

from __future__ import annotations

from surgery_formats.models.families.decoder import fused_attention, fused_gated_mlp, llama_named, pre_norm, rms_norms
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Layer, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY", "NAMES_ONLY"]


def recipe(settings: ModelSettings) -> Model:
    """Partial rotation (Phi-4-mini), two sets of rotary factors by length (arXiv:2404.14219, arXiv:2402.13753)."""
    sizes = read_sizes(settings, vocabulary=32064, max_positions=4096, hidden=3072, inner=8192)
    # the names are those in files of the first release
    rope = read_rope(settings, sizes, partial=1.0, original=4096, longrope_names=("su", "yarn"))
    window = settings.optional_count("sliding_window")
    settings.only("attention_bias", False)
    norm = rms_norms(settings, 1e-5)
    activation = settings.activation("hidden_act", default="silu")

    def layer(at: str, index: int) -> Layer:
        qkv, output = f"{at}.self_attn.qkv_proj", f"{at}.self_attn.o_proj"
        return Layer(
            fused_attention(qkv, output, sizes, rope=rope, window=window),
            pre_norm(norm(f"{at}.input_layernorm")),
            fused_gated_mlp(f"{at}.mlp", sizes, activation),
            pre_norm(norm(f"{at}.post_attention_layernorm")),
        )

    return llama_named(settings, sizes, layer, norm)


FAMILY = Family(names=("phi3",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
NAMES_ONLY = Family(names=("phi4",), embedding="model.embed_tokens", head="lm_head")
