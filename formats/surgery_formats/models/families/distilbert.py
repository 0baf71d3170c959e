# SPDX-License-Identifier: Apache-2.0
"""DistilBERT: BERT without token types and pooler, under its own names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from surgery_formats.models.families.decoder import projection, root_of
from surgery_formats.models.families.encoder import (
    EncoderSizes,
    Steps,
    encoder,
    encoder_only,
    named_norm,
    post_norm_layer,
)
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Embedding, Layer, Model
from surgery_formats.models.families.settings import LAYERS, ModelSettings

__all__ = ["FAMILY"]

_EPSILON = 1e-12  # not in config.json


def recipe(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """Sanh et al. 2019, arXiv:1910.01108; ``sinusoidal_pos_embds`` only initialises the stored table."""
    settings = ModelSettings(config)
    encoder_only(settings)
    settings.flag("sinusoidal_pos_embds", default=False)
    sizes = EncoderSizes(
        hidden=settings.count("dim", "hidden_size", default=768),
        inner=settings.count("hidden_dim", default=3072),
        layers=settings.count("n_layers", "num_hidden_layers", default=6, most=LAYERS),
        heads=settings.count("n_heads", "num_attention_heads", default=12),
        vocabulary=settings.count("vocab_size", default=30522),
        positions=settings.count("max_position_embeddings", default=512),
    )
    if sizes.hidden % sizes.heads:
        raise settings.fault(f"dim {sizes.hidden} is not a multiple of n_heads {sizes.heads}")
    activation = settings.activation("activation", default="gelu")
    root = root_of(names, "distilbert.", "embeddings.word_embeddings.weight")

    def layer(index: int) -> Layer:
        at = f"{root}transformer.layer.{index}"
        return post_norm_layer(
            sizes,
            (f"{at}.attention.q_lin", f"{at}.attention.k_lin", f"{at}.attention.v_lin"),
            f"{at}.attention.out_lin",
            f"{at}.ffn.lin1",
            f"{at}.ffn.lin2",
            (
                named_norm(names, f"{at}.sa_layer_norm", _EPSILON),
                named_norm(names, f"{at}.output_layer_norm", _EPSILON),
            ),
            activation,
        )

    def token(count: int) -> Steps:
        return ((projection("classifier", sizes.hidden, count, True), None),)

    return encoder(
        settings,
        names,
        sizes,
        Embedding(
            f"{root}embeddings.word_embeddings.weight",
            positions=f"{root}embeddings.position_embeddings.weight",
            norm=named_norm(names, f"{root}embeddings.LayerNorm", _EPSILON),
        ),
        map(layer, range(sizes.layers)),
        sequence=lambda count: (
            (projection("pre_classifier", sizes.hidden, sizes.hidden, True), "relu"),
            *token(count),
        ),
        token=token,
        pooler=None,
        max_positions=sizes.positions,
    )


FAMILY = Family(
    names=("distilbert",),
    embedding="distilbert.embeddings.word_embeddings",
    head="vocab_projector",
    tied=True,
    derivable=("embeddings.position_ids",),
    recipe=recipe,
)
