# SPDX-License-Identifier: Apache-2.0
"""LFM2: short convolutions beside attention."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, decoder, pre_norm, projection, root_of
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import MLP, Attention, Embedding, Layer, Model, Norm, ShortConvolution
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes

__all__ = ["FAMILY"]

_KINDS = ("conv", "full_attention")


def recipe(settings: ModelSettings) -> Model:
    """LFM2 (arXiv:2511.23404): most layers have a gated convolution over three tokens instead of attention."""
    sizes = read_sizes(
        settings,
        vocabulary=65536,
        max_positions=128000,
        kv_heads=8,
        hidden=2560,
        inner=12288,
        inner_keys=("block_ff_dim", "intermediate_size"),
    )
    settings.only("conv_bias", False)
    settings.raw(
        "block_norm_eps", "block_mlp_init_scale", "block_out_init_scale"
    )  # in its files, but nobody reads them
    kernel, inner = settings.count("conv_L_cache", default=3), _inner(settings, sizes)
    rope, epsilon = read_rope(settings, sizes, theta=1_000_000.0), settings.positive("norm_eps", default=1e-5)
    kinds = _kinds(settings, sizes.layers)

    def norm(name: str) -> Norm:
        return Norm("rms", f"{name}.weight", epsilon)

    def attend(at: str, index: int) -> Attention:
        if kinds[index] == "conv":
            return _convolution(f"{at}.conv", sizes, kernel)
        own = f"{at}.self_attn"
        q_norm, k_norm = norm(f"{own}.q_layernorm"), norm(f"{own}.k_layernorm")
        return attention(own, sizes, rope, q_norm=q_norm, k_norm=k_norm, output="out_proj")

    def layer(at: str, index: int) -> Layer:
        gate, up = (projection(f"{at}.feed_forward.{name}", sizes.hidden, inner) for name in ("w1", "w3"))
        return Layer(
            attend(at, index),
            pre_norm(norm(f"{at}.operator_norm")),
            MLP((gate, up), projection(f"{at}.feed_forward.w2", inner, sizes.hidden), "silu", gated=True),
            pre_norm(norm(f"{at}.ffn_norm")),
        )

    root = root_of(settings, "model.", "embed_tokens.weight")
    tied = settings.flag("tie_word_embeddings", "tie_embedding", default=True)
    settings.only("tie_embedding", tied)
    final, embedding = norm(f"{root}embedding_norm"), Embedding(f"{root}embed_tokens.weight")
    return decoder(settings, sizes, f"{root}layers", layer, final, embedding, tied=tied)


def _convolution(at: str, sizes: Sizes, kernel: int) -> Attention:
    return Attention(
        inputs=(projection(f"{at}.in_proj", sizes.hidden, 3 * sizes.hidden),),
        output=projection(f"{at}.out_proj", sizes.hidden, sizes.hidden),
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        scale=1.0,
        layout="concatenated",
        convolution=ShortConvolution(f"{at}.conv.weight", kernel),
    )


def _inner(settings: ModelSettings, sizes: Sizes) -> int:
    """The width of the MLP, which older configurations give before it is cut to two thirds and rounded up."""
    multiplier = settings.optional_positive("block_ffn_dim_multiplier", 1.0)
    multiple = settings.count("block_multiple_of", default=256)
    if not settings.flag("block_auto_adjust_ff_dim", default=True):
        return sizes.inner
    width = int(2 * sizes.inner / 3)
    return width if multiplier is None else -(-int(multiplier * width) // multiple) * multiple


def _kinds(settings: ModelSettings, layers: int) -> tuple[str, ...]:
    stored = settings.words("layer_types", layers, _KINDS)
    attending = settings.raw("full_attn_idxs")
    if stored is not None:
        return stored
    if attending is None:
        return ("full_attention",) * layers
    if not isinstance(attending, list) or not all(type(index) is int for index in attending):
        raise settings.fault("full_attn_idxs must be a list of numbers of layers")
    return tuple("full_attention" if index in attending else "conv" for index in range(layers))


FAMILY = Family(names=("lfm2",), embedding="model.embed_tokens", head="lm_head", tied=True, recipe=recipe)
