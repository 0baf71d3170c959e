# SPDX-License-Identifier: Apache-2.0
"""Cohere's Command-R, Aya (1) and Command-R7B, Command-A (2): parallel branches, norms without a bias, scaled logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from surgery_formats.models.families.decoder import attention, gated_mlp, layer_norm, llama_named, pre_norm, windows
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Branch, Layer, Model, Norm
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes

__all__ = ["COHERE", "COHERE2"]

_sizes = partial(read_sizes, vocabulary=256000, max_positions=8192, hidden=8192, inner=22528, layers=40, heads=64)


def cohere(settings: ModelSettings) -> Model:
    """Command-R: parallel branches, neighbouring pairs rotated, scaled logits; Command-R+ has norms of queries and keys."""
    sizes, norm = _sizes(settings), _norms(settings)
    rope = read_rope(settings, sizes, theta=500_000.0, interleaved=True)
    bias = settings.flag("attention_bias", default=False)
    normed = settings.flag("use_qk_norm", default=False)

    def attend(at: str, index: int) -> Attention:
        q_norm, k_norm = (norm(f"{at}.{which}_norm") if normed else None for which in "qk")
        return attention(at, sizes, rope, bias=bias, q_norm=q_norm, k_norm=k_norm, norm_over="heads")

    return _model(settings, sizes, attend, norm)


def cohere2(settings: ModelSettings) -> Model:
    """Command-R7B and Command-A (arXiv:2504.00698): three layers with a window and rotation, then one with neither."""
    sizes, norm = _sizes(settings), _norms(settings)
    rope = read_rope(settings, sizes, interleaved=True)
    bias = settings.flag("attention_bias", default=False)
    settings.only("use_qk_norm", False)
    settings.only("position_embedding_type", "rope_gptj")  # these two are in its files, but nobody reads them
    settings.only("rotary_pct", 1, 1.0)
    pattern = settings.count("sliding_window_pattern", "_sliding_window_pattern", "layer_switch", default=4)
    local = settings.optional_count("sliding_window", 4096)
    window = windows(settings, sizes, local, ((i + 1) % pattern != 0 for i in range(sizes.layers)))

    def attend(at: str, index: int) -> Attention:
        own = window[index]
        return attention(at, sizes, None if own is None else rope, bias=bias, window=own)

    return _model(settings, sizes, attend, norm)


def _norms(settings: ModelSettings) -> Callable[[str], Norm]:
    return partial(layer_norm, epsilon=settings.positive("layer_norm_eps", default=1e-5), bias=False)


def _model(
    settings: ModelSettings, sizes: Sizes, attend: Callable[[str, int], Attention], norm: Callable[[str], Norm]
) -> Model:
    activation = settings.activation("hidden_act", default="silu")

    def layer(at: str, index: int) -> Layer:
        return Layer(
            attend(f"{at}.self_attn", index),
            pre_norm(norm(f"{at}.input_layernorm")),
            gated_mlp(f"{at}.mlp", sizes, activation),
            Branch(),
            parallel=True,
        )

    divisor = 1 / settings.positive("logit_scale", default=0.0625)
    return llama_named(settings, sizes, layer, norm, tied=True, divisor=divisor)


COHERE = Family(names=("cohere",), embedding="model.embed_tokens", head="lm_head", tied=True, recipe=cohere)
COHERE2 = Family(names=("cohere2",), embedding="model.embed_tokens", head="lm_head", tied=True, recipe=cohere2)
