# SPDX-License-Identifier: Apache-2.0
"""BERT, and sentence encoders based on it (MiniLM); the masked-language head shares its matrix and bias."""

from __future__ import annotations

from dataclasses import replace

from surgery_formats.models.families.decoder import projection, root_of
from surgery_formats.models.families.encoder import (
    BERT_NAMES,
    bert_embedding,
    encoder,
    encoder_norm,
    language_head,
    post_norm_layers,
    read_encoder_sizes,
)
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import LanguageHead, Model
from surgery_formats.models.families.settings import ModelSettings

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """Post-norm layers, learned positions, and a pooler before a sequence classifier (arXiv:1810.04805)."""
    sizes = read_encoder_sizes(settings)
    epsilon = settings.positive("layer_norm_eps", default=1e-12)
    activation = settings.activation("hidden_act", default="gelu")
    root = root_of(settings, "bert.", "embeddings.word_embeddings.weight")
    layers = post_norm_layers(settings, sizes, f"{root}encoder.layer", BERT_NAMES, activation, epsilon)
    pooler = projection(f"{root}pooler.dense", sizes.hidden, sizes.hidden, True)
    embedding = bert_embedding(settings, root, epsilon)

    def language() -> LanguageHead:
        at = "cls.predictions"
        norm = encoder_norm(settings, f"{at}.transform.LayerNorm", epsilon)
        dense, output = f"{at}.transform.dense", f"{at}.decoder"
        return language_head(settings, sizes, embedding.tokens, dense, norm, output, activation)

    model = encoder(
        settings,
        sizes,
        embedding,
        layers,
        before=(pooler, "tanh"),
        pooler=pooler,
        choice=(pooler, "tanh"),
        language=language,
    )
    return replace(model, takes_past=True)


FAMILY = Family(
    names=("bert",),
    embedding="bert.embeddings.word_embeddings",
    head="cls.predictions.decoder",
    tied=True,
    ties=(("cls.predictions.decoder.bias", "cls.predictions.bias"),),
    derivable=("embeddings.position_ids", "embeddings.token_type_ids"),
    recipe=recipe,
)
