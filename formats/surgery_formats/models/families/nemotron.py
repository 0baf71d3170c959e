# SPDX-License-Identifier: Apache-2.0
"""Nemotron 3 and 4, Minitron: layer norms with gains of ``1 + g``, an MLP of squared ReLU; Jais 2 with plain gains."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from surgery_formats.models.families.decoder import attention, layer_norm, llama_named, plain_mlp, pre_norm
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Layer, Model, Norm, Rope
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes

__all__ = ["JAIS2", "NEMOTRON"]


def nemotron(settings: ModelSettings) -> Model:
    """Nemotron 4 and Minitron (arXiv:2402.16819): layer norms with gains of ``1 + g``, half of each head rotated, squared ReLU."""
    sizes = read_sizes(settings, vocabulary=256000, max_positions=4096, hidden=6144, inner=24576, heads=48)
    rope = read_rope(settings, sizes, partial=0.5)
    return _recipe(settings, sizes, rope, epsilon_key="norm_eps", bias=False, plus_one=True)


def jais2(settings: ModelSettings) -> Model:
    """Jais 2: layer norms, whole heads rotated, biases, squared ReLU."""
    sizes = read_sizes(settings, vocabulary=150272, max_positions=8192, hidden=3328, inner=26624, heads=26)
    rope = read_rope(settings, sizes)
    return _recipe(settings, sizes, rope, epsilon_key="layer_norm_eps", bias=True, plus_one=False)


def _recipe(
    settings: ModelSettings, sizes: Sizes, rope: Rope, *, epsilon_key: str, bias: bool, plus_one: bool
) -> Model:
    plain = partial(layer_norm, epsilon=settings.positive(epsilon_key, default=1e-5))
    attention_bias = settings.flag("attention_bias", default=bias)
    mlp_bias = settings.flag("mlp_bias", default=bias)
    activation = settings.activation("hidden_act", default="relu2")

    def norm(name: str) -> Norm:
        return replace(plain(name), plus_one=plus_one)

    def layer(at: str, index: int) -> Layer:
        return Layer(
            attention(f"{at}.self_attn", sizes, rope, bias=attention_bias),
            pre_norm(norm(f"{at}.input_layernorm")),
            plain_mlp(f"{at}.mlp.up_proj", f"{at}.mlp.down_proj", sizes, activation, bias=mlp_bias),
            pre_norm(norm(f"{at}.post_attention_layernorm")),
        )

    return llama_named(settings, sizes, layer, norm)


NEMOTRON = Family(names=("nemotron",), embedding="model.embed_tokens", head="lm_head", recipe=nemotron)
JAIS2 = Family(names=("jais2",), embedding="model.embed_tokens", head="lm_head", recipe=jais2)
