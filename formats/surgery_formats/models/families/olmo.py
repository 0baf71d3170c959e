# SPDX-License-Identifier: Apache-2.0
"""OLMo 1 (norms without parameters), OLMo 2 (norms after branches, and over all queries and keys), OLMo 3 (windows)."""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.models.families.decoder import attention, gated_mlp, llama_layer, llama_named, rms_norms, windows
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Branch, Layer, Model, Norm, Rope
from surgery_formats.models.families.rope import read_rope, ropes_of
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes

__all__ = ["OLMO", "OLMO2", "OLMO3"]


def olmo(settings: ModelSettings) -> Model:
    """OLMo 1 (arXiv:2402.00838)."""
    sizes = read_sizes(settings, vocabulary=50304, max_positions=2048)
    rope = read_rope(settings, sizes)
    bias = settings.flag("attention_bias", default=False)
    clip = settings.optional_positive("clip_qkv")

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=bias, clip=clip)

    def norm(at: str) -> Norm:
        return Norm("layer", "", 1e-5)

    return llama_named(settings, sizes, llama_layer(settings, sizes, attend, norm), norm)


def olmo2(settings: ModelSettings) -> Model:
    """OLMo 2 (arXiv:2501.00656)."""
    sizes = read_sizes(settings, vocabulary=50304, max_positions=2048)
    rope = read_rope(settings, sizes)
    return _post_norm(settings, sizes, (rope,) * sizes.layers, (None,) * sizes.layers)


def olmo3(settings: ModelSettings) -> Model:
    """OLMo 3 (arXiv:2512.13961): three layers with a window to one without, each kind with its own rotation."""
    sizes = read_sizes(settings, vocabulary=50304, max_positions=2048)
    local = settings.optional_count("sliding_window", 4096)
    window = windows(settings, sizes, local, ((i + 1) % 4 != 0 for i in range(sizes.layers)))
    theta = settings.positive("rope_theta", default=500_000.0)
    sliding, full = ropes_of(settings, sizes, (theta, theta))
    ropes = tuple(full if own is None else sliding for own in window)
    return _post_norm(settings, sizes, ropes, window)


def _post_norm(settings: ModelSettings, sizes: Sizes, ropes: Sequence[Rope], window: Sequence[int | None]) -> Model:
    norm = rms_norms(settings, 1e-5)
    bias = settings.flag("attention_bias", default=False)
    activation = settings.activation("hidden_act", default="silu")

    def layer(at: str, index: int) -> Layer:
        q_norm, k_norm = norm(f"{at}.self_attn.q_norm"), norm(f"{at}.self_attn.k_norm")
        return Layer(
            attention(
                f"{at}.self_attn",
                sizes,
                ropes[index],
                bias=bias,
                window=window[index],
                q_norm=q_norm,
                k_norm=k_norm,
                norm_over="width",
            ),
            Branch(after=norm(f"{at}.post_attention_layernorm")),
            gated_mlp(f"{at}.mlp", sizes, activation),
            Branch(after=norm(f"{at}.post_feedforward_layernorm")),
        )

    return llama_named(settings, sizes, layer, norm)


OLMO = Family(names=("olmo",), embedding="model.embed_tokens", head="lm_head", recipe=olmo)
OLMO2 = Family(names=("olmo2",), embedding="model.embed_tokens", head="lm_head", recipe=olmo2)
OLMO3 = Family(names=("olmo3",), embedding="model.embed_tokens", head="lm_head", recipe=olmo3)
