# SPDX-License-Identifier: Apache-2.0
"""ERNIE 4.5 (dense) and Helium: Llama, rotated in neighbouring pairs."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, llama_layer, llama_named, rms_norms
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["ERNIE", "HELIUM"]


def ernie(settings: ModelSettings) -> Model:
    """ERNIE 4.5, 0.3B: neighbouring pairs rotated."""
    sizes = read_sizes(
        settings,
        vocabulary=103424,
        max_positions=131072,
        kv_heads=2,
        head_dim=128,
        hidden=1024,
        inner=3072,
        layers=18,
        heads=16,
    )
    rope = read_rope(settings, sizes, theta=500_000.0, interleaved=True)
    norm, bias = rms_norms(settings, 1e-5), settings.flag("use_bias", default=False)

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=bias)

    layer = llama_layer(settings, sizes, attend, norm, mlp_bias=bias)
    return llama_named(settings, sizes, layer, norm, tied=True)


def helium(settings: ModelSettings) -> Model:
    """Helium 1, 2B: neighbouring pairs rotated."""
    sizes = read_sizes(
        settings,
        vocabulary=48000,
        max_positions=4096,
        kv_heads=20,
        head_dim=128,
        hidden=2560,
        inner=7040,
        layers=24,
        heads=20,
    )
    rope = read_rope(settings, sizes, theta=100_000.0, interleaved=True)
    norm, bias = rms_norms(settings, 1e-8), settings.flag("attention_bias", default=False)

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=bias, output_bias=False)

    layer = llama_layer(settings, sizes, attend, norm, mlp_bias=settings.flag("mlp_bias", default=False))
    return llama_named(settings, sizes, layer, norm)


ERNIE = Family(names=("ernie4_5",), embedding="model.embed_tokens", head="lm_head", tied=True, recipe=ernie)
HELIUM = Family(names=("helium",), embedding="model.embed_tokens", head="lm_head", recipe=helium)
