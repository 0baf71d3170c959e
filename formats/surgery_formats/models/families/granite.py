# SPDX-License-Identifier: Apache-2.0
"""Granite and HyperCLOVA X: Llama with multipliers on embedding, branches, scores and logits; or with stacked experts."""

from __future__ import annotations

from dataclasses import replace

from surgery_formats.models.families.decoder import (
    attention,
    gated_mlp,
    llama_layer,
    llama_named,
    projection,
    rms_norms,
)
from surgery_formats.models.families.experts import Transformation, expert_count, mixture, stacked_networks
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import MLP, Attention, Branch, Experts, Layer, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes

__all__ = ["FAMILY", "GRANITE_MOE", "HYPERCLOVAX"]


def recipe(settings: ModelSettings) -> Model:
    """arXiv:2408.13359; the multipliers are those of maximal update parametrisation (arXiv:2203.03466)."""
    return _multiplied(settings, read_sizes(settings, vocabulary=32000, max_positions=2048))


def granite_moe(settings: ModelSettings) -> Model:
    """Granite 3 with experts, two tensors per layer, and in ``granitemoeshared`` one more for every token."""
    sizes = read_sizes(settings, vocabulary=32000, max_positions=2048)
    count = expert_count(settings, sizes, "num_local_experts", default=8)
    top = settings.count("num_experts_per_tok", default=2)
    inner = settings.whole("shared_intermediate_size", default=0)
    activation = settings.activation("hidden_act", default="silu")

    def transform(at: str, index: int) -> Experts:
        block = f"{at}.block_sparse_moe"
        networks = stacked_networks(
            f"{block}.input_linear.weight",
            f"{block}.output_linear.weight",
            count,
            sizes.hidden,
            sizes.inner,
            activation,
        )
        both = projection(f"{at}.shared_mlp.input_linear", sizes.hidden, 2 * inner)
        down = projection(f"{at}.shared_mlp.output_linear", inner, sizes.hidden)
        shared = MLP((both,), down, activation, gated=True) if inner else None
        return mixture(settings, f"{block}.router.layer", sizes.hidden, networks, top=top, shared=shared)

    return _multiplied(settings, sizes, transform)


def _multiplied(settings: ModelSettings, sizes: Sizes, transform: Transformation | None = None) -> Model:
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
        transform=transform,
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
GRANITE_MOE = replace(FAMILY, names=("granitemoe", "granitemoeshared"), recipe=granite_moe)
