# SPDX-License-Identifier: Apache-2.0
"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, llama_layer, llama_named, rms_norms
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """A window of 4096 by default, and none if it is ``null`` (arXiv:2310.06825)."""
    sizes = read_sizes(settings, vocabulary=32000, max_positions=4096 * 32, kv_heads=8, inner=14336)
    rope, norm = read_rope(settings, sizes), rms_norms(settings)
    window = settings.optional_count("sliding_window", 4096)
    expected = "full_attention" if window is None else "sliding_attention"
    # a model with layers of both types has another architecture (Ministral)
    settings.words("layer_types", sizes.layers, (expected,))

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, window=window)

    return llama_named(settings, sizes, llama_layer(settings, sizes, attend, norm), norm)


FAMILY = Family(names=("mistral",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
