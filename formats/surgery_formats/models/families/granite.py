# SPDX-License-Identifier: Apache-2.0
"""Granite: Llama with multipliers on the embedding, the branches, the scores and the logits."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, llama_layer, llama_named, rms_norms
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """arXiv:2408.13359; the multipliers are those of maximal update parametrisation (arXiv:2203.03466)."""
    sizes = read_sizes(settings, vocabulary=32000, max_positions=2048)
    rope, norm = read_rope(settings, sizes), rms_norms(settings)
    bias = settings.flag("attention_bias", default=False)
    scale = settings.positive("attention_multiplier", default=1.0)

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=bias, scale=scale)

    layer = llama_layer(
        settings,
        sizes,
        attend,
        norm,
        mlp_bias=settings.flag("mlp_bias", default=False),
        multiplier=settings.number("residual_multiplier", default=1.0),
    )
    return llama_named(
        settings,
        sizes,
        layer,
        norm,
        scale=settings.number("embedding_multiplier", default=1.0),
        divisor=settings.positive("logits_scaling", default=1.0),
    )


FAMILY = Family(names=("granite",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
