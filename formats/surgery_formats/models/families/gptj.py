# SPDX-License-Identifier: Apache-2.0
"""GPT-J: parallel branches, the first values of each head rotated in neighbouring pairs, a head with a bias."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, decoder, layer_norm, plain_mlp, pre_norm, root_of
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.gpt2 import read_gpt2_sizes
from surgery_formats.models.families.recipe import Branch, Embedding, Layer, Model, Rope
from surgery_formats.models.families.settings import ModelSettings

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """Wang and Komatsuzaki 2021, *GPT-J-6B*: parallel branches, neighbouring pairs rotated, a head with a bias."""
    sizes = read_gpt2_sizes(settings, vocabulary=50400, max_positions=2048, hidden=4096, layers=28, heads=16)
    settings.only("rotary", True)
    settings.only("scale_attn_weights", True)
    dims = settings.count("rotary_dim", default=64 if not settings.has("rotary_dim") else sizes.head_dim)
    if dims % 2 or dims > sizes.head_dim:
        raise settings.fault(f"rotary_dim is {dims}; it must be even and at most the {sizes.head_dim} of a head")
    rope = Rope(dims, {"rope_type": "default", "rope_theta": 10000.0}, sizes.max_positions, interleaved=True)
    epsilon = settings.positive("layer_norm_epsilon", default=1e-5)
    activation = settings.activation("activation_function", default="gelu_new")

    def layer(at: str, index: int) -> Layer:
        return Layer(
            attention(f"{at}.attn", sizes, rope, output="out_proj"),
            pre_norm(layer_norm(f"{at}.ln_1", epsilon)),
            plain_mlp(f"{at}.mlp.fc_in", f"{at}.mlp.fc_out", sizes, activation),
            Branch(),
            parallel=True,
        )

    root = root_of(settings, "transformer.", "wte.weight")
    final, embedding = layer_norm(f"{root}ln_f", epsilon), Embedding(f"{root}wte.weight")
    return decoder(settings, sizes, f"{root}h", layer, final, embedding, head_bias=True)


FAMILY = Family(
    names=("gptj",),
    embedding="transformer.wte",
    head="lm_head",
    derivable=("attn.bias", "attn.masked_bias", "attn.embed_positions"),
    recipe=recipe,
)
