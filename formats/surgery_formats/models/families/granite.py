# SPDX-License-Identifier: Apache-2.0
"""Granite: Llama with multipliers on the embedding, the branches, the scores and the logits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from surgery_formats.models.families.decoder import attention, causal_only, llama_like, read_sizes, rms
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings

__all__ = ["FAMILY"]


def recipe(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """arXiv:2408.13359; the multipliers are those of maximal update parametrisation (arXiv:2203.03466)."""
    settings = ModelSettings(config)
    causal_only(settings)
    sizes = read_sizes(settings, vocabulary=32000, max_positions=2048)
    rope = read_rope(settings, sizes.head_dim, sizes.max_positions)
    bias = settings.flag("attention_bias", default=False)
    scale = settings.positive("attention_multiplier", default=1.0)

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=bias, output_bias=bias, scale=scale)

    return llama_like(
        settings,
        names,
        sizes,
        attend,
        partial(rms, epsilon=settings.positive("rms_norm_eps", default=1e-6)),
        activation=settings.activation("hidden_act", default="silu"),
        mlp_bias=settings.flag("mlp_bias", default=False),
        multiplier=settings.number("residual_multiplier", default=1.0),
        scale=settings.number("embedding_multiplier", default=1.0),
        divisor=settings.positive("logits_scaling", default=1.0),
    )


FAMILY = Family(names=("granite",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
