# SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3, and decoders with Llama's names but no recipe of their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from surgery_formats.models.families.decoder import attention, causal_only, llama_like, read_sizes, rms
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings

__all__ = ["FAMILY", "NAMES_ONLY"]


def recipe(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """Pre-norm, RMS, rotary, gated (arXiv:2307.09288, arXiv:2407.21783)."""
    settings = ModelSettings(config)
    causal_only(settings)
    sizes = read_sizes(settings, vocabulary=32000, max_positions=2048)
    rope = read_rope(settings, sizes.head_dim, sizes.max_positions)
    bias = settings.flag("attention_bias", default=False)

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=bias, output_bias=bias)

    return llama_like(
        settings,
        names,
        sizes,
        attend,
        partial(rms, epsilon=settings.positive("rms_norm_eps", default=1e-6)),
        activation=settings.activation("hidden_act", default="silu"),
        mlp_bias=settings.flag("mlp_bias", default=False),
    )


FAMILY = Family(names=("llama",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)

NAMES_ONLY = Family(
    names=("cohere", "starcoder2", "phi"),
    embedding="model.embed_tokens",
    head="lm_head",
)
