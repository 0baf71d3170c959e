# SPDX-License-Identifier: Apache-2.0
"""BLOOM: ALiBi, a norm behind the embedding, q, k and v interleaved by head; the head is the embedding."""

from __future__ import annotations

from functools import partial

from surgery_formats.models.families.alibi import bloom_slopes
from surgery_formats.models.families.decoder import decoder, fused_attention, layer_norm, plain_mlp, pre_norm, root_of
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Alibi, Embedding, Layer, Model
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """BLOOM (arXiv:2211.05100): ALiBi, a norm behind the embedding; no length is built in: 2048 is that of its training."""
    sizes = read_sizes(
        settings,
        vocabulary=250880,
        max_positions=2048,
        hidden=64,
        inner=None,
        layers=2,
        heads=8,
        grouped=False,
        hidden_keys=("hidden_size", "n_embed"),
        inner_keys=("n_inner",),
        layers_keys=("n_layer", "num_hidden_layers"),
        heads_keys=("n_head", "num_attention_heads"),
        max_positions_keys=("seq_length", "max_position_embeddings"),
    )
    settings.only("apply_residual_connection_post_layernorm", False)
    settings.raw("offset_alibi")  # of the program that trained it
    norm = partial(layer_norm, epsilon=settings.positive("layer_norm_epsilon", default=1e-5))
    alibi = Alibi(bloom_slopes(sizes.heads))

    def layer(at: str, index: int) -> Layer:
        qkv, output = f"{at}.self_attention.query_key_value", f"{at}.self_attention.dense"
        return Layer(
            fused_attention(qkv, output, sizes, layout="by_head", bias=True, alibi=alibi),
            pre_norm(norm(f"{at}.input_layernorm")),
            plain_mlp(f"{at}.mlp.dense_h_to_4h", f"{at}.mlp.dense_4h_to_h", sizes, "gelu_tanh"),
            pre_norm(norm(f"{at}.post_attention_layernorm")),
        )

    root = root_of(settings, "transformer.", "word_embeddings.weight")
    embedding = Embedding(f"{root}word_embeddings.weight", norm=norm(f"{root}word_embeddings_layernorm"))
    return decoder(settings, sizes, f"{root}h", layer, norm(f"{root}ln_f"), embedding, tied=True)


FAMILY = Family(names=("bloom",), embedding="transformer.word_embeddings", head="lm_head", tied=True, recipe=recipe)
