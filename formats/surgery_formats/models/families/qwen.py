# SPDX-License-Identifier: Apache-2.0
"""Qwen 2, 2.5 and 3, dense: Llama with biases on q, k and v (2), or with norms of each head's queries and keys (3)."""

from __future__ import annotations

from functools import partial

from surgery_formats.models.families.decoder import attention, llama_layer, llama_named, rms_norms, windows
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes

__all__ = ["QWEN2", "QWEN3"]

_sizes = partial(read_sizes, vocabulary=151936, max_positions=32768, kv_heads=32, inner=22016)


def qwen2(settings: ModelSettings) -> Model:
    """Qwen 2: biases on q, k and v (arXiv:2407.10671)."""
    sizes = _sizes(settings)
    rope, norm, window = read_rope(settings, sizes), rms_norms(settings), _windows(settings, sizes)

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=True, output_bias=False, window=window[index])

    return llama_named(settings, sizes, llama_layer(settings, sizes, attend, norm), norm)


def qwen3(settings: ModelSettings) -> Model:
    """Qwen 3: norms of queries and keys, one gain for all heads (arXiv:2505.09388); 128 values per head by default."""
    sizes = _sizes(settings, head_dim=128)
    rope, norm, window = read_rope(settings, sizes), rms_norms(settings), _windows(settings, sizes)
    bias = settings.flag("attention_bias", default=False)

    def attend(at: str, index: int) -> Attention:
        q_norm, k_norm = norm(f"{at}.q_norm"), norm(f"{at}.k_norm")
        return attention(at, sizes, rope, bias=bias, window=window[index], q_norm=q_norm, k_norm=k_norm)

    return llama_named(settings, sizes, llama_layer(settings, sizes, attend, norm), norm)


def _windows(settings: ModelSettings, sizes: Sizes) -> tuple[int | None, ...]:
    """Windows of all layers: those from ``max_window_layers`` on slide, if enabled."""
    window = settings.optional_count("sliding_window", 4096)
    first = settings.whole("max_window_layers", default=28)
    window = window if settings.flag("use_sliding_window", default=False) else None
    return windows(settings, sizes, window, (window is not None and i >= first for i in range(sizes.layers)))


QWEN2 = Family(names=("qwen2",), embedding="model.embed_tokens", head="lm_head", recipe=qwen2)
QWEN3 = Family(names=("qwen3",), embedding="model.embed_tokens", head="lm_head", recipe=qwen3)
