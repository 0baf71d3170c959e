# SPDX-License-Identifier: Apache-2.0
"""SmolLM 3: Llama without rotation in every fourth layer."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, llama_layer, llama_named, rms_norms, windows
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """Layers without positions after arXiv:2501.18795."""
    sizes = read_sizes(settings, vocabulary=128256, max_positions=32768, kv_heads=4, hidden=2048, layers=36, heads=16)
    rope, norm = read_rope(settings, sizes, theta=2_000_000.0), rms_norms(settings)
    rotated = _rotated(settings, sizes.layers)
    window = settings.optional_count("sliding_window")
    window = window if settings.flag("use_sliding_window", default=False) else None
    settings.raw("max_window_layers")  # from Qwen; transformers does not read it here
    by_layer = windows(settings, sizes, window, (window is not None and not rotates for rotates in rotated))
    bias = settings.flag("attention_bias", default=False)

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope if rotated[index] else None, bias=bias, window=by_layer[index])

    layer = llama_layer(settings, sizes, attend, norm, mlp_bias=settings.flag("mlp_bias", default=False))
    return llama_named(settings, sizes, layer, norm, tied=True)


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
