# SPDX-License-Identifier: Apache-2.0
"""Granite and HyperCLOVA X: Llama with multipliers on the embedding, the branches, the scores and the logits."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, gated_mlp, llama_layer, llama_named, rms_norms
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Branch, Layer, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY", "HYPERCLOVAX"]


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


def hyperclovax(settings: ModelSettings) -> Model:
    """HyperCLOVA X SEED: norms behind the branches too, and logits that are multiplied where Granite divides."""
    sizes = read_sizes(settings, vocabulary=32000, max_positions=2048)
    rope, norm = read_rope(settings, sizes), rms_norms(settings)
    bias, mlp_bias = settings.flag("attention_bias", default=False), settings.flag("mlp_bias", default=False)
    scale = settings.optional_positive("attention_multiplier")
    multiplier = settings.number("residual_multiplier", default=1.0)
    after = settings.flag("use_post_norm", default=True)
    activation = settings.activation("hidden_act", default="silu")

    def layer(at: str, index: int) -> Layer:
        first, second = (norm(f"{at}.post_norm{number}") if after else None for number in (1, 2))
        return Layer(
            attention(f"{at}.self_attn", sizes, rope, bias=bias, scale=scale),
            Branch(norm(f"{at}.input_layernorm"), first, multiplier=multiplier),
            gated_mlp(f"{at}.mlp", sizes, activation, bias=mlp_bias),
            Branch(norm(f"{at}.post_attention_layernorm"), second, multiplier=multiplier),
        )

    embedded = settings.number("embedding_multiplier", default=1.0)
    divisor = 1 / settings.positive("logits_scaling", default=1.0)
    return llama_named(settings, sizes, layer, norm, scale=embedded, divisor=divisor)


FAMILY = Family(names=("granite",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
HYPERCLOVAX = Family(names=("hyperclovax",), embedding="model.embed_tokens", head="lm_head", recipe=hyperclovax)
