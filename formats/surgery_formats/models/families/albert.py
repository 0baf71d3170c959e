# SPDX-License-Identifier: Apache-2.0
"""ALBERT: a narrow embedding, and layers that share their weights."""

from __future__ import annotations

from collections.abc import Iterator

from surgery_formats.models.families.decoder import projection, root_of
from surgery_formats.models.families.encoder import (
    LayerNames,
    bert_embedding,
    encoder,
    encoder_norm,
    language_head,
    post_norm_layer,
    read_encoder_sizes,
)
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Activation, LanguageHead, Layer, Model, Projection
from surgery_formats.models.families.settings import MOST_LAYERS, ModelSettings

__all__ = ["FAMILY"]

_NAMES = LayerNames(
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.dense",
    "attention.LayerNorm",
    "ffn",
    "ffn_output",
    "full_layer_layer_norm",
)


def recipe(settings: ModelSettings) -> Model:
    """Lan et al. 2019, arXiv:1909.11942; every layer runs the inner layers of its group, one after the other."""
    sizes = read_encoder_sizes(settings, vocabulary=30000, hidden=4096, inner=16384, heads=64)
    epsilon = settings.positive("layer_norm_eps", default=1e-12)
    activation = settings.activation("hidden_act", default="gelu_new")
    narrow = settings.count("embedding_size", default=128)
    groups = settings.count("num_hidden_groups", default=1, most=sizes.layers)
    inner = settings.count("inner_group_num", default=1, most=MOST_LAYERS // sizes.layers)
    root = root_of(settings, "albert.", "embeddings.word_embeddings.weight")

    def layers() -> Iterator[Layer]:
        for index in range(sizes.layers):
            stack = f"{root}encoder.albert_layer_groups.{int(index / (sizes.layers / groups))}.albert_layers"
            for number in range(inner):
                yield post_norm_layer(settings, sizes, f"{stack}.{number}", _NAMES, activation, epsilon)

    pooler = projection(f"{root}pooler", sizes.hidden, sizes.hidden, True)
    widening = projection(f"{root}encoder.embedding_hidden_mapping_in", narrow, sizes.hidden, True)
    embedding = bert_embedding(settings, root, epsilon, projection=widening, projected="norm")
    step: tuple[Projection, Activation] = (pooler, "tanh")

    def language() -> LanguageHead:
        dense, norm = "predictions.dense", encoder_norm(settings, "predictions.LayerNorm", epsilon)
        output = "predictions.decoder"
        return language_head(settings, sizes, embedding.tokens, dense, norm, output, activation, width=narrow)

    return encoder(settings, sizes, embedding, layers(), before=step, pooler=pooler, choice=step, language=language)


FAMILY = Family(
    names=("albert",),
    embedding="albert.embeddings.word_embeddings",
    head="predictions.decoder",
    tied=True,
    ties=(("predictions.decoder.bias", "predictions.bias"),),
    derivable=("embeddings.position_ids", "embeddings.token_type_ids"),
    recipe=recipe,
)
