# SPDX-License-Identifier: Apache-2.0
"""GPT-BigCode (SantaCoder, StarCoder 1): GPT-2 with ordinary linear layers and one key head."""

from __future__ import annotations

from dataclasses import replace

from surgery_formats.models.families.decoder import decoder, fused_attention, layer_norm, plain_mlp, pre_norm, root_of
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.gpt2 import read_gpt2_sizes
from surgery_formats.models.families.recipe import Embedding, Layer, Model
from surgery_formats.models.families.settings import ModelSettings

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """StarCoder 1 (arXiv:2305.06161): one key head; without `multi_query`, q, k and v are interleaved by head."""
    sizes = read_gpt2_sizes(settings)
    epsilon = settings.positive("layer_norm_epsilon", default=1e-5)
    activation = settings.activation("activation_function", default="gelu_pytorch_tanh")
    scale = sizes.head_dim**-0.5 if settings.flag("scale_attn_weights", default=True) else 1.0
    settings.raw("scale_attention_softmax_in_fp32")  # the same arithmetic, always in float32
    single = settings.flag("multi_query", default=True)
    if single:
        sizes = replace(sizes, kv_heads=1)
    root = root_of(settings, "transformer.", "wte.weight")

    def layer(at: str, index: int) -> Layer:
        qkv, output = f"{at}.attn.c_attn", f"{at}.attn.c_proj"
        return Layer(
            fused_attention(qkv, output, sizes, layout="concatenated" if single else "by_head", bias=True, scale=scale),
            pre_norm(layer_norm(f"{at}.ln_1", epsilon)),
            plain_mlp(f"{at}.mlp.c_fc", f"{at}.mlp.c_proj", sizes, activation),
            pre_norm(layer_norm(f"{at}.ln_2", epsilon)),
        )

    embedding = Embedding(f"{root}wte.weight", positions=f"{root}wpe.weight")
    return decoder(settings, sizes, f"{root}h", layer, layer_norm(f"{root}ln_f", epsilon), embedding, tied=True)


FAMILY = Family(
    names=("gpt_bigcode",),
    embedding="transformer.wte",
    head="lm_head",
    tied=True,
    derivable=("attn.bias", "attn.masked_bias"),
    recipe=recipe,
)
