# SPDX-License-Identifier: Apache-2.0
"""StableLM: layer norms with biases, a quarter of each head rotated, and optionally parallel branches."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from surgery_formats.models.families.decoder import (
    attention,
    causal_only,
    decoder,
    gated_mlp,
    layer_norm,
    pre_norm,
    read_sizes,
    root_of,
)
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Branch, Embedding, Layer, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings

__all__ = ["FAMILY"]


def recipe(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """arXiv:2402.17834, with norms of queries and keys that have a gain per head."""
    settings = ModelSettings(config)
    causal_only(settings)
    sizes = read_sizes(settings, vocabulary=50304, max_positions=4096, kv_heads=32, hidden=2560, inner=6912)
    rope = read_rope(settings, sizes.head_dim, sizes.max_positions, partial=0.25)
    epsilon = settings.positive("layer_norm_eps", default=1e-5)
    bias = settings.flag("use_qkv_bias", default=False)
    normed = settings.flag("qk_layernorm", default=False)
    parallel = settings.flag("use_parallel_residual", default=False)
    activation = settings.activation("hidden_act", default="silu")
    root = root_of(names, "model.", "embed_tokens.weight")

    def layer(index: int) -> Layer:
        at = f"{root}layers.{index}"
        q_norm, k_norm = (
            layer_norm(f"{at}.self_attn.{which}_layernorm.norms.{{h}}", epsilon, bias=False) if normed else None
            for which in "qk"
        )
        attend = attention(f"{at}.self_attn", sizes, rope, bias=bias, q_norm=q_norm, k_norm=k_norm)
        after = Branch() if parallel else pre_norm(layer_norm(f"{at}.post_attention_layernorm", epsilon))
        return Layer(
            replace(attend, norm_over="heads"),
            pre_norm(layer_norm(f"{at}.input_layernorm", epsilon)),
            gated_mlp(f"{at}.mlp", sizes, activation),
            after,
            parallel=parallel,
        )

    return decoder(
        settings,
        names,
        sizes,
        map(layer, range(sizes.layers)),
        layer_norm(f"{root}norm", epsilon),
        Embedding(f"{root}embed_tokens.weight"),
    )


FAMILY = Family(names=("stablelm",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
