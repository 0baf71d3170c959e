# SPDX-License-Identifier: Apache-2.0
"""Falcon: one key head (7B), groups of heads interleaved in one projection (40B, 11B), or ALiBi and all heads (RW)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

from surgery_formats.models.families.alibi import bloom_slopes
from surgery_formats.models.families.decoder import decoder, fused_attention, layer_norm, plain_mlp, pre_norm, root_of
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Alibi, Branch, Embedding, Layer, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes

__all__ = ["FAMILY"]

Layout = Literal["concatenated", "by_head", "by_group"]


def recipe(settings: ModelSettings) -> Model:
    """Falcon 7B, 40B, 11B and RW (arXiv:2311.16867); the bias of RW is scaled with the scores, and rounded to bfloat16 in every type."""
    sizes = read_sizes(
        settings,
        vocabulary=65024,
        max_positions=2048,
        hidden=4544,
        inner=None,
        heads=71,
        grouped=False,
        hidden_keys=("hidden_size", "n_embed"),
        inner_keys=("ffn_hidden_size",),
    )
    settings.only("apply_residual_connection_post_layernorm", False)
    grouped = settings.flag("new_decoder_architecture", default=False)
    sizes, layout = _grouping(settings, sizes, grouped)
    biased = settings.flag("alibi", default=False)
    rope = None if biased else read_rope(settings, sizes)
    settings.raw("rope_theta", "rope_scaling", "rope_parameters")  # there even where nothing is rotated
    alibi = Alibi(bloom_slopes(sizes.heads), sizes.head_dim**-0.5, rounded=True) if biased else None
    parallel = settings.flag("parallel_attn", default=True)
    norms = settings.count("num_ln_in_parallel_attn", default=2 if grouped else 1, most=2)
    if (grouped and not parallel) or (norms == 2 and not grouped):
        raise settings.fault("parallel_attn and num_ln_in_parallel_attn do not go with new_decoder_architecture")
    bias = settings.flag("bias", default=False)
    activation = settings.activation("activation", default="gelu")
    norm = partial(layer_norm, epsilon=settings.positive("layer_norm_epsilon", default=1e-5))

    def layer(at: str, index: int) -> Layer:
        qkv, output = f"{at}.self_attention.query_key_value", f"{at}.self_attention.dense"
        second = f"{at}.ln_mlp" if norms == 2 else "" if parallel else f"{at}.post_attention_layernorm"
        return Layer(
            fused_attention(qkv, output, sizes, layout=layout, rope=rope, bias=bias, alibi=alibi),
            pre_norm(norm(f"{at}.ln_attn" if norms == 2 else f"{at}.input_layernorm")),
            plain_mlp(f"{at}.mlp.dense_h_to_4h", f"{at}.mlp.dense_4h_to_h", sizes, activation, bias=bias),
            pre_norm(norm(second)) if second else Branch(),
            parallel=parallel,
        )

    root = root_of(settings, "transformer.", "word_embeddings.weight")
    final, embedding = norm(f"{root}ln_f"), Embedding(f"{root}word_embeddings.weight")
    return decoder(settings, sizes, f"{root}h", layer, final, embedding, tied=True)


def _grouping(settings: ModelSettings, sizes: Sizes, grouped: bool) -> tuple[Sizes, Layout]:
    """How many key heads there are, and how queries, keys and values lie in their projection."""
    several = settings.count("num_kv_heads", default=sizes.heads)
    one = settings.flag("multi_query", default=True)
    if grouped:
        if sizes.heads % several:
            raise settings.fault(f"num_attention_heads {sizes.heads} is not a multiple of num_kv_heads {several}")
        return replace(sizes, kv_heads=several), "by_group"
    return (replace(sizes, kv_heads=1), "concatenated") if one else (sizes, "by_head")


FAMILY = Family(names=("falcon",), embedding="transformer.word_embeddings", head="lm_head", tied=True, recipe=recipe)
