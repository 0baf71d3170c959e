# SPDX-License-Identifier: Apache-2.0
"""Mistral: Llama with a sliding window in every layer."""

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
    """A window of 4096 by default, and none if it is ``null`` (arXiv:2310.06825)."""
    settings = ModelSettings(config)
    causal_only(settings)
    sizes = read_sizes(settings, vocabulary=32000, max_positions=4096 * 32, kv_heads=8, inner=14336)
    rope = read_rope(settings, sizes.head_dim, sizes.max_positions)
    window = settings.optional_count("sliding_window", 4096)
    expected = "full_attention" if window is None else "sliding_attention"
    # a model with layers of both types has another architecture (Ministral)
    settings.words("layer_types", sizes.layers, (expected,))

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, window=window)

    return llama_like(
        settings,
        names,
        sizes,
        attend,
        partial(rms, epsilon=settings.positive("rms_norm_eps", default=1e-6)),
        activation=settings.activation("hidden_act", default="silu"),
    )


FAMILY = Family(names=("mistral",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
