# SPDX-License-Identifier: Apache-2.0
"""Phi-3 and Phi-4: q, k, v in one projection, gate and up in another, both in memory and on disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from surgery_formats.models.families.decoder import causal_only, decoder, pre_norm, projection, read_sizes, rms, root_of
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import MLP, Attention, Embedding, Layer, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings

__all__ = ["FAMILY", "NAMES_ONLY"]


def recipe(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """Partial rotation (Phi-4-mini), two sets of rotary factors by length (arXiv:2404.14219, arXiv:2402.13753)."""
    settings = ModelSettings(config)
    causal_only(settings)
    sizes = read_sizes(settings, vocabulary=32064, max_positions=4096, hidden=3072, inner=8192)
    rope = read_rope(
        settings,
        sizes.head_dim,
        sizes.max_positions,
        partial=1.0,
        original=4096,
        longrope_names=("su", "yarn"),  # in files of the first release
    )
    window = settings.optional_count("sliding_window")
    settings.only("attention_bias", False)
    norm = partial(rms, epsilon=settings.positive("rms_norm_eps", default=1e-5))
    activation = settings.activation("hidden_act", default="silu")
    queries = sizes.heads * sizes.head_dim
    together = queries + 2 * sizes.kv_heads * sizes.head_dim
    root = root_of(names, "model.", "embed_tokens.weight")

    def layer(index: int) -> Layer:
        at = f"{root}layers.{index}"
        return Layer(
            Attention(
                inputs=(projection(f"{at}.self_attn.qkv_proj", sizes.hidden, together),),
                layout="concatenated",
                output=projection(f"{at}.self_attn.o_proj", queries, sizes.hidden),
                heads=sizes.heads,
                kv_heads=sizes.kv_heads,
                head_dim=sizes.head_dim,
                scale=sizes.head_dim**-0.5,
                rope=rope,
                window=window,
            ),
            pre_norm(norm(f"{at}.input_layernorm")),
            MLP(
                inputs=(projection(f"{at}.mlp.gate_up_proj", sizes.hidden, 2 * sizes.inner),),
                output=projection(f"{at}.mlp.down_proj", sizes.inner, sizes.hidden),
                activation=activation,
                gated=True,
            ),
            pre_norm(norm(f"{at}.post_attention_layernorm")),
        )

    return decoder(
        settings,
        names,
        sizes,
        map(layer, range(sizes.layers)),
        norm(f"{root}norm"),
        Embedding(f"{root}embed_tokens.weight"),
    )


FAMILY = Family(names=("phi3",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
NAMES_ONLY = Family(names=("phi4",), embedding="model.embed_tokens", head="lm_head")
