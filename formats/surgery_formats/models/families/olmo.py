# SPDX-License-Identifier: Apache-2.0
"""OLMo 1 (norms without parameters) and OLMo 2 (a norm after each branch, and over all queries and keys at once)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from surgery_formats.models.families.decoder import (
    attention,
    causal_only,
    decoder,
    gated_mlp,
    llama_like,
    read_sizes,
    rms,
    root_of,
)
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Branch, Embedding, Layer, Model, Norm
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings

__all__ = ["OLMO", "OLMO2"]


def olmo(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """OLMo 1 (arXiv:2402.00838)."""
    settings = ModelSettings(config)
    causal_only(settings)
    settings.only("clip_qkv")
    sizes = read_sizes(settings, vocabulary=50304, max_positions=2048)
    rope = read_rope(settings, sizes.head_dim, sizes.max_positions)
    bias = settings.flag("attention_bias", default=False)

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=bias, output_bias=bias)

    def norm(at: str) -> Norm:
        return Norm("layer", "", 1e-5)

    activation = settings.activation("hidden_act", default="silu")
    return llama_like(settings, names, sizes, attend, norm, activation=activation)


def olmo2(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """OLMo 2 (arXiv:2501.00656)."""
    settings = ModelSettings(config)
    causal_only(settings)
    sizes = read_sizes(settings, vocabulary=50304, max_positions=2048)
    rope = read_rope(settings, sizes.head_dim, sizes.max_positions)
    bias = settings.flag("attention_bias", default=False)
    norm = partial(rms, epsilon=settings.positive("rms_norm_eps", default=1e-5))
    activation = settings.activation("hidden_act", default="silu")
    root = root_of(names, "model.", "embed_tokens.weight")

    def layer(index: int) -> Layer:
        at = f"{root}layers.{index}"
        attend = attention(
            f"{at}.self_attn",
            sizes,
            rope,
            bias=bias,
            output_bias=bias,
            q_norm=norm(f"{at}.self_attn.q_norm"),
            k_norm=norm(f"{at}.self_attn.k_norm"),
        )
        return Layer(
            replace(attend, norm_over="width"),
            Branch(after=norm(f"{at}.post_attention_layernorm")),
            gated_mlp(f"{at}.mlp", sizes, activation),
            Branch(after=norm(f"{at}.post_feedforward_layernorm")),
        )

    return decoder(
        settings,
        names,
        sizes,
        map(layer, range(sizes.layers)),
        norm(f"{root}norm"),
        Embedding(f"{root}embed_tokens.weight"),
    )


OLMO = Family(names=("olmo",), embedding="model.embed_tokens", head="lm_head", recipe=olmo)
OLMO2 = Family(names=("olmo2",), embedding="model.embed_tokens", head="lm_head", recipe=olmo2)
