# SPDX-License-Identifier: Apache-2.0
"""Qwen 2, 2.5 and 3, dense: Llama with biases on q, k and v (2), or with norms of each head's queries and keys (3)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from surgery_formats.models.families.decoder import Sizes, attention, causal_only, llama_like, read_sizes, rms, windows
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings

__all__ = ["QWEN2", "QWEN3"]


def qwen2(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """Qwen 2: biases on q, k and v (arXiv:2407.10671)."""
    settings = ModelSettings(config)
    causal_only(settings)
    sizes = read_sizes(settings, vocabulary=151936, max_positions=32768, kv_heads=32, inner=22016)
    rope = read_rope(settings, sizes.head_dim, sizes.max_positions)
    window = _windows(settings, sizes)

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=True, window=window[index])

    return _model(settings, names, sizes, attend)


def qwen3(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """Qwen 3: norms of queries and keys, one gain for all heads (arXiv:2505.09388); 128 values per head by default."""
    settings = ModelSettings(config)
    causal_only(settings)
    sizes = read_sizes(settings, vocabulary=151936, max_positions=32768, kv_heads=32, inner=22016, head_dim=128)
    rope = read_rope(settings, sizes.head_dim, sizes.max_positions)
    window = _windows(settings, sizes)
    bias = settings.flag("attention_bias", default=False)
    epsilon = settings.positive("rms_norm_eps", default=1e-6)

    def attend(at: str, index: int) -> Attention:
        return attention(
            at,
            sizes,
            rope,
            bias=bias,
            output_bias=bias,
            window=window[index],
            q_norm=rms(f"{at}.q_norm", epsilon),
            k_norm=rms(f"{at}.k_norm", epsilon),
        )

    return _model(settings, names, sizes, attend)


def _windows(settings: ModelSettings, sizes: Sizes) -> tuple[int | None, ...]:
    """Windows of all layers: those from ``max_window_layers`` on slide, if enabled."""
    window = settings.optional_count("sliding_window", 4096)
    first = settings.whole("max_window_layers", default=28)
    window = window if settings.flag("use_sliding_window", default=False) else None
    return windows(settings, sizes, window, (window is not None and i >= first for i in range(sizes.layers)))


def _model(
    settings: ModelSettings, names: Collection[str], sizes: Sizes, attend: Callable[[str, int], Attention]
) -> Model:
    return llama_like(
        settings,
        names,
        sizes,
        attend,
        partial(rms, epsilon=settings.positive("rms_norm_eps", default=1e-6)),
        activation=settings.activation("hidden_act", default="silu"),
    )


QWEN2 = Family(names=("qwen2",), embedding="model.embed_tokens", head="lm_head", recipe=qwen2)
QWEN3 = Family(names=("qwen3",), embedding="model.embed_tokens", head="lm_head", recipe=qwen3)
