# SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3, and decoders with Llama's names but no recipe of their own."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, llama_layer, llama_named, rms_norms
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY", "NAMES_ONLY"]


def recipe(settings: ModelSettings) -> Model:
    """Pre-norm, RMS, rotary, gated (arXiv:2307.09288, arXiv:2407.21783)."""
    sizes = read_sizes(settings, vocabulary=32000, max_positions=2048)
    rope, norm = read_rope(settings, sizes), rms_norms(settings)
    bias = settings.flag("attention_bias", default=False)

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=bias)

    layer = llama_layer(settings, sizes, attend, norm, mlp_bias=settings.flag("mlp_bias", default=False))
    return llama_named(settings, sizes, layer, norm)


FAMILY = Family(names=("llama",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
NAMES_ONLY = Family(names=("cohere", "starcoder2", "phi"), embedding="model.embed_tokens", head="lm_head")
