# SPDX-License-Identifier: Apache-2.0
"""Mistral: Llama with a sliding window in every layer; Ministral, in some; Ministral 3, with queries that grow."""

from __future__ import annotations

from dataclasses import replace

from surgery_formats.models.families.decoder import attention, llama_layer, llama_named, rms_norms, windows
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Model, PositionScale
from surgery_formats.models.families.rope import read_rope, rope_of
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY", "MINISTRAL", "MINISTRAL3"]

_MINISTRAL_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


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


def ministral(settings: ModelSettings) -> Model:
    """Ministral 8B: the layers have a window or none, by their types."""
    sizes = read_sizes(settings, vocabulary=32000, max_positions=4096 * 32, kv_heads=8, inner=14336)
    rope, norm = read_rope(settings, sizes), rms_norms(settings)
    local = settings.optional_count("sliding_window", 4096)
    window = windows(settings, sizes, local, (local is not None for _ in range(sizes.layers)))

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, window=window[index])

    return llama_named(settings, sizes, llama_layer(settings, sizes, attend, norm), norm)


def ministral3(settings: ModelSettings) -> Model:
    """Ministral 3 (arXiv:2601.08584): queries grow with their position, beside YaRN."""
    sizes = read_sizes(
        settings, vocabulary=131072, max_positions=262144, kv_heads=8, head_dim=128, inner=14336, layers=34
    )
    norm, window = rms_norms(settings, 1e-5), settings.optional_count("sliding_window")
    parameters = settings.mapping("rope_scaling") or settings.mapping("rope_parameters") or dict(_MINISTRAL_ROPE)
    settings.mapping("rope_parameters")
    parameters.setdefault("rope_theta", settings.positive("rope_theta", default=10000.0))
    inner = ModelSettings({**parameters, "model_type": settings.raw("model_type")})
    scale = PositionScale(
        inner.positive("llama_4_scaling_beta", default=0.1), inner.count("original_max_position_embeddings")
    )
    if "llama_4_scaling_beta" not in parameters:
        raise settings.fault("llama_4_scaling_beta is missing in the rotary parameters")
    unread = ("llama_4_scaling_beta", "max_position_embeddings")
    rope = rope_of(settings, {key: value for key, value in parameters.items() if key not in unread}, sizes)
    settings.raw("layer_types")  # transformers does not read it here

    def attend(at: str, index: int) -> Attention:
        return replace(attention(at, sizes, rope, window=window), query_scale=scale)

    return llama_named(settings, sizes, llama_layer(settings, sizes, attend, norm), norm)


FAMILY = Family(names=("mistral",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
MINISTRAL = Family(names=("ministral",), embedding="model.embed_tokens", head="lm_head", recipe=ministral)
MINISTRAL3 = Family(names=("ministral3",), embedding="model.embed_tokens", head="lm_head", recipe=ministral3)
