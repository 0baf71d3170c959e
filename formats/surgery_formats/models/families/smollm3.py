# SPDX-License-Identifier: Apache-2.0
"""SmolLM 3: Llama without rotation in every fourth layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from surgery_formats.models.families.decoder import attention, causal_only, llama_like, read_sizes, rms, windows
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings

__all__ = ["FAMILY"]


def recipe(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """Layers without positions after arXiv:2501.18795."""
    settings = ModelSettings(config)
    causal_only(settings)
    sizes = read_sizes(settings, vocabulary=128256, max_positions=32768, kv_heads=4, hidden=2048, layers=36, heads=16)
    rope = read_rope(settings, sizes.head_dim, sizes.max_positions, theta=2_000_000.0)
    rotated = _rotated(settings, sizes.layers)
    window = settings.optional_count("sliding_window")
    window = window if settings.flag("use_sliding_window", default=False) else None
    settings.raw("max_window_layers")  # from Qwen; transformers does not read it here
    by_layer = windows(settings, sizes, window, (window is not None and not rotates for rotates in rotated))
    bias = settings.flag("attention_bias", default=False)

    def attend(at: str, index: int) -> Attention:
        own = rope if rotated[index] else None
        return attention(at, sizes, own, bias=bias, output_bias=bias, window=by_layer[index])

    return llama_like(
        settings,
        names,
        sizes,
        attend,
        partial(rms, epsilon=settings.positive("rms_norm_eps", default=1e-6)),
        activation=settings.activation("hidden_act", default="silu"),
        mlp_bias=settings.flag("mlp_bias", default=False),
        tied=True,
    )


def _rotated(settings: ModelSettings, layers: int) -> tuple[bool, ...]:
    """Whether each layer rotates; in ``no_rope_layers`` 1 means that it does."""
    interval = settings.count("no_rope_layer_interval", default=4)
    flags = settings.raw("no_rope_layers")
    if flags is None:
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if not isinstance(flags, list) or len(flags) < layers or any(x not in (0, 1) for x in flags):
        raise settings.fault(f"no_rope_layers must be a list of 0 and 1 for each of the {layers} layers")
    return tuple(bool(x) for x in flags[:layers])


FAMILY = Family(names=("smollm3",), embedding="model.embed_tokens", head="lm_head", tied=True, recipe=recipe)
