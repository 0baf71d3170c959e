# SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3, and Llama with windows in three of four layers (CWM)."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, llama_layer, llama_named, rms_norms, windows
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["CWM", "FAMILY"]

_CWM_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def recipe(settings: ModelSettings) -> Model:
    """Pre-norm, RMS, rotary, gated (arXiv:2307.09288, arXiv:2407.21783)."""
    sizes = read_sizes(settings, vocabulary=32000, max_positions=2048)
    rope, norm = read_rope(settings, sizes), rms_norms(settings)
    bias = settings.flag("attention_bias", default=False)

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=bias)

    layer = llama_layer(settings, sizes, attend, norm, mlp_bias=settings.flag("mlp_bias", default=False))
    return llama_named(settings, sizes, layer, norm)


def cwm(settings: ModelSettings) -> Model:
    """Code World Model (arXiv:2510.02387): of four layers, one sees everything and three have a window."""
    sizes = read_sizes(
        settings,
        vocabulary=128256,
        max_positions=131072,
        kv_heads=8,
        head_dim=128,
        hidden=6144,
        inner=21504,
        layers=64,
        heads=48,
    )
    rope, norm = read_rope(settings, sizes, theta=1_000_000.0, missing=_CWM_ROPE), rms_norms(settings, 1e-5)
    window = windows(
        settings, sizes, settings.optional_count("sliding_window", 8192), (i % 4 != 0 for i in range(sizes.layers))
    )
    settings.only("mlp_bias", False)

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, window=window[index])

    return llama_named(settings, sizes, llama_layer(settings, sizes, attend, norm), norm)


FAMILY = Family(names=("llama",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
CWM = Family(names=("cwm",), embedding="model.embed_tokens", head="lm_head", recipe=cwm)
