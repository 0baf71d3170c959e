# SPDX-License-Identifier: Apache-2.0
"""Gemma 1, 2 and 3 (text): gains of ``1 + g``, a scaled embedding; 2 and 3 add post-branch norms and local layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from surgery_formats.models.families.decoder import attention, gated_mlp, llama_layer, llama_named, rms_norms, windows
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Branch, Layer, Model, Norm
from surgery_formats.models.families.rope import read_rope, ropes_of
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes

__all__ = ["GEMMA", "GEMMA2", "GEMMA3", "VAULTGEMMA"]

_ACTIVATION = "gelu_pytorch_tanh"
_sizes = partial(read_sizes, kv_heads=4, head_dim=256, hidden=2304, inner=9216, layers=26, heads=8)  # of Gemma 2 and 3


def gemma(settings: ModelSettings) -> Model:
    """Gemma 1 (arXiv:2403.08295)."""
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
    rope, norm = read_rope(settings, sizes), rms_norms(settings, plus_one=True)
    bias = settings.flag("attention_bias", default=False)
    settings.only("hidden_activation", _ACTIVATION)
    # The first release has "gelu" but means the approximation.
    name = settings.text("hidden_act", default=_ACTIVATION)
    activation = "gelu_tanh" if name == "gelu" else settings.activation("hidden_act", default=_ACTIVATION)

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=bias)

    layer = llama_layer(settings, sizes, attend, norm, activation=activation)
    return llama_named(settings, sizes, layer, norm, scale=sizes.hidden**0.5, scale_rounded=True, tied=True)


def gemma2(settings: ModelSettings) -> Model:
    """Gemma 2 (arXiv:2408.00118): every other layer is local; scores and logits are capped."""
    return _capped(settings, after=True)


def vaultgemma(settings: ModelSettings) -> Model:
    """VaultGemma (arXiv:2510.15001): Gemma 2 without norms behind the branches."""
    return _capped(settings, after=False)


def _capped(settings: ModelSettings, *, after: bool) -> Model:
    sizes = _sizes(settings, vocabulary=256000, max_positions=8192)
    rope = read_rope(settings, sizes)
    local = settings.optional_count("sliding_window", 4096)
    window = windows(settings, sizes, local, (i % 2 == 0 for i in range(sizes.layers)))
    softcap = settings.optional_positive("attn_logit_softcapping", 50.0)
    bias = settings.flag("attention_bias", default=False)
    scale = settings.positive("query_pre_attn_scalar", default=256) ** -0.5

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=bias, scale=scale, window=window[index], softcap=softcap)

    norm = rms_norms(settings, plus_one=True)
    return _model(
        settings, sizes, attend, norm, settings.optional_positive("final_logit_softcapping", 30.0), after=after
    )


def gemma3(settings: ModelSettings) -> Model:
    """Gemma 3 (arXiv:2503.19786): five local layers to one global, with separate rotations; query and key norms."""
    settings.only("attn_logit_softcapping")  # transformers reads it without using it
    sizes = _sizes(settings, vocabulary=262208, max_positions=131072)
    local_rope, global_rope = ropes_of(
        settings,
        sizes,
        (
            settings.positive("rope_local_base_freq", default=10_000.0),
            settings.positive("rope_theta", default=1_000_000.0),
        ),
    )
    pattern = settings.count("sliding_window_pattern", "_sliding_window_pattern", default=6)
    local = settings.optional_count("sliding_window", 4096)
    window = windows(settings, sizes, local, ((i + 1) % pattern != 0 for i in range(sizes.layers)))
    bias = settings.flag("attention_bias", default=False)
    scale = settings.positive("query_pre_attn_scalar", default=256) ** -0.5
    norm = rms_norms(settings, plus_one=True)

    def attend(at: str, index: int) -> Attention:
        rope = global_rope if window[index] is None else local_rope
        attend = partial(attention, q_norm=norm(f"{at}.q_norm"), k_norm=norm(f"{at}.k_norm"))
        return attend(at, sizes, rope, bias=bias, scale=scale, window=window[index])

    return _model(settings, sizes, attend, norm, settings.optional_positive("final_logit_softcapping"))


def _model(
    settings: ModelSettings,
    sizes: Sizes,
    attend: Callable[[str, int], Attention],
    norm: Callable[[str], Norm],
    softcap: float | None,
    *,
    after: bool = True,
) -> Model:
    """The part that Gemma 2 and 3 share: a norm before and `after` each branch."""
    activation = settings.activation("hidden_activation", default=_ACTIVATION)

    def layer(at: str, index: int) -> Layer:
        return Layer(
            attend(f"{at}.self_attn", index),
            Branch(norm(f"{at}.input_layernorm"), norm(f"{at}.post_attention_layernorm") if after else None),
            gated_mlp(f"{at}.mlp", sizes, activation),
            Branch(
                norm(f"{at}.pre_feedforward_layernorm"),
                norm(f"{at}.post_feedforward_layernorm") if after else None,
            ),
        )

    scale = sizes.hidden**0.5
    return llama_named(settings, sizes, layer, norm, scale=scale, scale_rounded=True, tied=True, softcap=softcap)


GEMMA = Family(names=("gemma",), embedding="model.embed_tokens", head="lm_head", tied=True, recipe=gemma)
GEMMA2 = Family(names=("gemma2",), embedding="model.embed_tokens", head="lm_head", tied=True, recipe=gemma2)
GEMMA3 = Family(names=("gemma3_text",), embedding="model.embed_tokens", head="lm_head", tied=True, recipe=gemma3)
VAULTGEMMA = Family(
    names=("vaultgemma",),
    embedding="model.embed_tokens",
    head="lm_head",
    tied=True,
    recipe=vaultgemma,
)
