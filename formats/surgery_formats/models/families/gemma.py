# SPDX-License-Identifier: Apache-2.0
"""Gemma 1, 2 and 3 (text): gains of ``1 + g``, a scaled embedding; 2 and 3 add post-branch norms and local layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from surgery_formats.models.families.decoder import (
    Sizes,
    attention,
    causal_only,
    decoder,
    gated_mlp,
    llama_like,
    read_sizes,
    rms,
    root_of,
    windows,
)
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Branch, Embedding, Layer, Model, Rope
from surgery_formats.models.families.rope import read_rope, rope_of
from surgery_formats.models.families.settings import ModelSettings

__all__ = ["GEMMA", "GEMMA2", "GEMMA3"]


_ACTIVATION = "gelu_pytorch_tanh"


def gemma(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """Gemma 1 (arXiv:2403.08295)."""
    settings = ModelSettings(config)
    causal_only(settings)
    sizes = read_sizes(
        settings,
        vocabulary=256000,
        max_positions=8192,
        kv_heads=16,
        head_dim=256,
        hidden=3072,
        inner=24576,
        layers=28,
        heads=16,
    )
    rope = read_rope(settings, sizes.head_dim, sizes.max_positions)
    bias = settings.flag("attention_bias", default=False)
    settings.only("hidden_activation", _ACTIVATION)
    # The first release has "gelu" but means the approximation.
    name = settings.text("hidden_act", default=_ACTIVATION)
    activation = "gelu_tanh" if name == "gelu" else settings.activation("hidden_act", default=_ACTIVATION)

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=bias, output_bias=bias)

    return llama_like(
        settings,
        names,
        sizes,
        attend,
        partial(rms, epsilon=settings.positive("rms_norm_eps", default=1e-6), plus_one=True),
        activation=activation,
        scale=sizes.hidden**0.5,
        scale_rounded=True,
        tied=True,
    )


def gemma2(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """Gemma 2 (arXiv:2408.00118): every other layer is local; scores and logits are capped."""
    settings = ModelSettings(config)
    causal_only(settings)
    sizes = _sizes(settings, vocabulary=256000, max_positions=8192)
    rope = read_rope(settings, sizes.head_dim, sizes.max_positions)
    window = windows(
        settings, sizes, settings.optional_count("sliding_window", 4096), (i % 2 == 0 for i in range(sizes.layers))
    )
    softcap = settings.optional_positive("attn_logit_softcapping", 50.0)
    bias = settings.flag("attention_bias", default=False)
    scale = settings.positive("query_pre_attn_scalar", default=256) ** -0.5

    def attend(at: str, index: int) -> Attention:
        return attention(
            at, sizes, rope, bias=bias, output_bias=bias, scale=scale, window=window[index], softcap=softcap
        )

    return _model(settings, names, sizes, attend, settings.optional_positive("final_logit_softcapping", 30.0))


def gemma3(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """Gemma 3 (arXiv:2503.19786): five local layers to one global, with separate rotations; query and key norms."""
    settings = ModelSettings(config)
    causal_only(settings)
    settings.only("attn_logit_softcapping")  # transformers reads it without using it
    sizes = _sizes(settings, vocabulary=262208, max_positions=131072)
    local, everywhere = _ropes(settings, sizes)
    pattern = settings.count("sliding_window_pattern", "_sliding_window_pattern", default=6)
    window = windows(
        settings,
        sizes,
        settings.optional_count("sliding_window", 4096),
        ((i + 1) % pattern != 0 for i in range(sizes.layers)),
    )
    bias = settings.flag("attention_bias", default=False)
    scale = settings.positive("query_pre_attn_scalar", default=256) ** -0.5
    norm = partial(rms, epsilon=settings.positive("rms_norm_eps", default=1e-6), plus_one=True)

    def attend(at: str, index: int) -> Attention:
        return attention(
            at,
            sizes,
            everywhere if window[index] is None else local,
            bias=bias,
            output_bias=bias,
            scale=scale,
            window=window[index],
            q_norm=norm(f"{at}.q_norm"),
            k_norm=norm(f"{at}.k_norm"),
        )

    return _model(settings, names, sizes, attend, settings.optional_positive("final_logit_softcapping"))


def _sizes(settings: ModelSettings, *, vocabulary: int, max_positions: int) -> Sizes:
    return read_sizes(
        settings,
        vocabulary=vocabulary,
        max_positions=max_positions,
        kv_heads=4,
        head_dim=256,
        hidden=2304,
        inner=9216,
        layers=26,
        heads=8,
    )


def _ropes(settings: ModelSettings, sizes: Sizes) -> tuple[Rope, Rope]:
    """Rotations of local and global layers; in transformers 4, ``rope_scaling`` applies to the global ones."""
    kinds = ("sliding_attention", "full_attention")
    nested = settings.mapping("rope_parameters") or {}
    if unknown := [key for key in nested if key not in kinds]:
        raise settings.fault(f"rope_parameters must be by layer type, but has '{unknown[0]}'")
    thetas = (
        settings.positive("rope_local_base_freq", default=10_000.0),
        settings.positive("rope_theta", default=1_000_000.0),
    )
    ropes = []
    for kind, theta in zip(kinds, thetas, strict=True):
        values = nested.get(kind) or {}
        if not isinstance(values, Mapping):
            raise settings.fault(f"rope_parameters of {kind} must be an object")
        own = {"rope_theta": theta, **values}
        if kind == "full_attention":
            own |= settings.mapping("rope_scaling") or {}
        if own.get("partial_rotary_factor", 1.0) not in (1, None):
            raise settings.fault("partial_rotary_factor is set, but this family rotates whole heads")
        ropes.append(rope_of(settings, own, sizes.head_dim, sizes.max_positions))
    return ropes[0], ropes[1]


def _model(
    settings: ModelSettings,
    names: Collection[str],
    sizes: Sizes,
    attend: Callable[[str, int], Attention],
    softcap: float | None,
) -> Model:
    """The part that Gemma 2 and 3 share: a norm before and after each branch."""
    norm = partial(rms, epsilon=settings.positive("rms_norm_eps", default=1e-6), plus_one=True)
    activation = settings.activation("hidden_activation", default=_ACTIVATION)
    root = root_of(names, "model.", "embed_tokens.weight")

    def layer(index: int) -> Layer:
        at = f"{root}layers.{index}"
        return Layer(
            attend(f"{at}.self_attn", index),
            Branch(before=norm(f"{at}.input_layernorm"), after=norm(f"{at}.post_attention_layernorm")),
            gated_mlp(f"{at}.mlp", sizes, activation),
            Branch(before=norm(f"{at}.pre_feedforward_layernorm"), after=norm(f"{at}.post_feedforward_layernorm")),
        )

    return decoder(
        settings,
        names,
        sizes,
        map(layer, range(sizes.layers)),
        norm(f"{root}norm"),
        Embedding(f"{root}embed_tokens.weight", scale=sizes.hidden**0.5, scale_rounded=True),
        tied=True,
        softcap=softcap,
    )


GEMMA = Family(names=("gemma",), embedding="model.embed_tokens", head="lm_head", tied=True, recipe=gemma)
GEMMA2 = Family(names=("gemma2",), embedding="model.embed_tokens", head="lm_head", tied=True, recipe=gemma2)
GEMMA3 = Family(names=("gemma3_text",), embedding="model.embed_tokens", head="lm_head", tied=True, recipe=gemma3)
