# SPDX-License-Identifier: Apache-2.0
"""BERT, and sentence encoders based on it (MiniLM); the masked-language head shares its matrix and bias."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from surgery_formats.models.families.decoder import projection, root_of
from surgery_formats.models.families.encoder import (
    Steps,
    bert_layers,
    encoder,
    encoder_only,
    named_norm,
    read_encoder_sizes,
)
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Embedding, Model
from surgery_formats.models.families.settings import ModelSettings

__all__ = ["FAMILY", "NAMES_ONLY"]


def recipe(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """Post-norm layers, learned positions, and a pooler before a sequence classifier (arXiv:1810.04805)."""
    settings = ModelSettings(config)
    encoder_only(settings)
    sizes = read_encoder_sizes(settings)
    epsilon = settings.positive("layer_norm_eps", default=1e-12)
    root = root_of(names, "bert.", "embeddings.word_embeddings.weight")
    at = f"{root}embeddings"
    pooler = projection(f"{root}pooler.dense", sizes.hidden, sizes.hidden, True)

    def token(count: int) -> Steps:
        return ((projection("classifier", sizes.hidden, count, True), None),)

    return encoder(
        settings,
        names,
        sizes,
        Embedding(
            f"{at}.word_embeddings.weight",
            positions=f"{at}.position_embeddings.weight",
            types=f"{at}.token_type_embeddings.weight",
            norm=named_norm(names, f"{at}.LayerNorm", epsilon),
        ),
        bert_layers(settings, names, sizes, root, epsilon),
        sequence=lambda count: ((pooler, "tanh"), *token(count)),
        token=token,
        pooler=pooler,
        max_positions=sizes.positions,
    )


FAMILY = Family(
    names=("bert",),
    embedding="bert.embeddings.word_embeddings",
    head="cls.predictions.decoder",
    tied=True,
    ties=(("cls.predictions.decoder.bias", "cls.predictions.bias"),),
    derivable=("embeddings.position_ids", "embeddings.token_type_ids"),
    recipe=recipe,
)
NAMES_ONLY = replace(FAMILY, names=("electra", "deberta-v2"), recipe=None)
