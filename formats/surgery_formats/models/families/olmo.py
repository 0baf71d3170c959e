# SPDX-License-Identifier: Apache-2.0
"""OLMo 1 (norms without parameters) and OLMo 2 (a norm after each branch, and over all queries and keys at once)."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, gated_mlp, llama_layer, llama_named, rms_norms
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Branch, Layer, Model, Norm
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["OLMO", "OLMO2"]


def olmo(settings: ModelSettings) -> Model:
    """OLMo 1 (arXiv:2402.00838)."""
    settings.only("clip_qkv")
    sizes = read_sizes(settings, vocabulary=50304, max_positions=2048)
    rope = read_rope(settings, sizes)
    bias = settings.flag("attention_bias", default=False)

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=bias)

    def norm(at: str) -> Norm:
        return Norm("layer", "", 1e-5)

    return llama_named(settings, sizes, llama_layer(settings, sizes, attend, norm), norm)


def olmo2(settings: ModelSettings) -> Model:
    """OLMo 2 (arXiv:2501.00656)."""
    sizes = read_sizes(settings, vocabulary=50304, max_positions=2048)
    rope, norm = read_rope(settings, sizes), rms_norms(settings, 1e-5)
    bias = settings.flag("attention_bias", default=False)
    activation = settings.activation("hidden_act", default="silu")

    def layer(at: str, index: int) -> Layer:
        q_norm, k_norm = norm(f"{at}.self_attn.q_norm"), norm(f"{at}.self_attn.k_norm")
        return Layer(
            attention(f"{at}.self_attn", sizes, rope, bias=bias, q_norm=q_norm, k_norm=k_norm, norm_over="width"),
            Branch(after=norm(f"{at}.post_attention_layernorm")),
            gated_mlp(f"{at}.mlp", sizes, activation),
            Branch(after=norm(f"{at}.post_feedforward_layernorm")),
        )

    return llama_named(settings, sizes, layer, norm)


OLMO = Family(names=("olmo",), embedding="model.embed_tokens", head="lm_head", recipe=olmo)
OLMO2 = Family(names=("olmo2",), embedding="model.embed_tokens", head="lm_head", recipe=olmo2)
