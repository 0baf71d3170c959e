# SPDX-License-Identifier: Apache-2.0
"""StarCoder 2: Llama's names with layer norms, biases and an MLP without a gate."""

from __future__ import annotations

from functools import partial

from surgery_formats.models.families.decoder import attention, layer_norm, llama_named, plain_mlp, pre_norm
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Layer, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """StarCoder 2 (arXiv:2402.19173): layer norms, biases, an MLP without a gate."""
    sizes = read_sizes(
        settings,
        vocabulary=49152,
        max_positions=4096,
        kv_heads=2,
        hidden=3072,
        inner=12288,
        layers=30,
        heads=24,
    )
    rope, window = read_rope(settings, sizes), settings.optional_count("sliding_window")
    norm = partial(layer_norm, epsilon=settings.positive("norm_epsilon", default=1e-5))
    bias = settings.flag("use_bias", default=True)
    # of StarCoder 1, and still in its files: nobody reads them
    settings.raw("layer_norm_epsilon", "scale_attn_weights", "scale_attention_softmax_in_fp32")
    activation = settings.activation("hidden_act", default="gelu_pytorch_tanh")

    def layer(at: str, index: int) -> Layer:
        return Layer(
            attention(f"{at}.self_attn", sizes, rope, bias=bias, window=window),
            pre_norm(norm(f"{at}.input_layernorm")),
            plain_mlp(f"{at}.mlp.c_fc", f"{at}.mlp.c_proj", sizes, activation, bias=bias),
            pre_norm(norm(f"{at}.post_attention_layernorm")),
        )

    return llama_named(settings, sizes, layer, norm, tied=True)


FAMILY = Family(names=("starcoder2",), embedding="model.embed_tokens", head="lm_head", tied=True, recipe=recipe)
