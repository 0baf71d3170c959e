# SPDX-License-Identifier: Apache-2.0
"""Arcee's AFM, and Apertus: Llama with an MLP without a gate, of squared ReLU or xIELU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from surgery_formats.models.families.decoder import attention, llama_named, plain_mlp, pre_norm, rms_norms
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import MLP, Attention, Layer, Model, Norm
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes

__all__ = ["APERTUS", "ARCEE"]

_APERTUS_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12_000_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def arcee(settings: ModelSettings) -> Model:
    """AFM-4.5B: Llama with an MLP of squared ReLU."""
    sizes = read_sizes(settings, vocabulary=32000, max_positions=4096, hidden=2560, inner=18432)
    rope, norm = read_rope(settings, sizes), rms_norms(settings, 1e-5)
    bias = settings.flag("attention_bias", default=False)
    mlp_bias = settings.flag("mlp_bias", default=False)
    activation = settings.activation("hidden_act", default="relu2")

    def attend(at: str) -> Attention:
        return attention(at, sizes, rope, bias=bias)

    def mlp(at: str) -> MLP:
        return plain_mlp(f"{at}.up_proj", f"{at}.down_proj", sizes, activation, bias=mlp_bias)

    return _model(settings, sizes, attend, mlp, norm, ("input_layernorm", "post_attention_layernorm"))


def apertus(settings: ModelSettings) -> Model:
    """Apertus (arXiv:2509.14233): norms of queries and keys, an activation with two learned numbers."""
    sizes = read_sizes(settings, vocabulary=131072, max_positions=65536, inner=14336)
    norm = rms_norms(settings, 1e-5)
    rope = read_rope(settings, sizes, theta=12_000_000.0, missing=_APERTUS_ROPE)
    bias = settings.flag("attention_bias", default=False)
    settings.only("hidden_act", "xielu")
    settings.only("qk_norm", True)
    settings.only("post_norm", False)

    def attend(at: str) -> Attention:
        return attention(at, sizes, rope, bias=bias, q_norm=norm(f"{at}.q_norm"), k_norm=norm(f"{at}.k_norm"))

    def mlp(at: str) -> MLP:
        plain = plain_mlp(f"{at}.up_proj", f"{at}.down_proj", sizes, "xielu", bias=False)
        return replace(plain, shape=f"{at}.act_fn")

    return _model(settings, sizes, attend, mlp, norm, ("attention_layernorm", "feedforward_layernorm"))


def _model(
    settings: ModelSettings,
    sizes: Sizes,
    attend: Callable[[str], Attention],
    mlp: Callable[[str], MLP],
    norm: Callable[[str], Norm],
    norms: tuple[str, str],
) -> Model:
    def layer(at: str, index: int) -> Layer:
        first, second = (pre_norm(norm(f"{at}.{name}")) for name in norms)
        return Layer(attend(f"{at}.self_attn"), first, mlp(f"{at}.mlp"), second)

    return llama_named(settings, sizes, layer, norm)


ARCEE = Family(names=("arcee",), embedding="model.embed_tokens", head="lm_head", recipe=arcee)
APERTUS = Family(names=("apertus",), embedding="model.embed_tokens", head="lm_head", recipe=apertus)
