# SPDX-License-Identifier: Apache-2.0
"""ELECTRA: BERT over an embedding of its own width, with a two-layer classifier instead of a pooler."""

from __future__ import annotations

from dataclasses import replace

from surgery_formats.models.families.bert import FAMILY as BERT
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
from surgery_formats.models.families.recipe import ClassifierHead, LanguageHead, Model
from surgery_formats.models.families.settings import ModelSettings

__all__ = ["ELECTRA"]


def recipe(settings: ModelSettings) -> Model:
    """Clark et al. 2020, arXiv:2003.10555; the embedding is projected if it is narrower than the layers."""
    sizes = read_encoder_sizes(settings, hidden=256, inner=1024, heads=4)
    epsilon = settings.positive("layer_norm_eps", default=1e-12)
    activation = settings.activation("hidden_act", default="gelu")
    narrow = settings.count("embedding_size", default=128)
    root = root_of(settings, "electra.", "embeddings.word_embeddings.weight")
    widening = projection(f"{root}embeddings_project", narrow, sizes.hidden, True) if narrow != sizes.hidden else None
    embedding = bert_embedding(settings, root, epsilon, projection=widening, projected="norm")

    def language() -> LanguageHead:
        dense, norm = "generator_predictions.dense", encoder_norm(settings, "generator_predictions.LayerNorm", epsilon)
        return language_head(settings, sizes, embedding.tokens, dense, norm, "generator_lm_head", "gelu", width=narrow)

    def choices() -> ClassifierHead:
        """The summary of a row, then its score."""
        settings.only("summary_type", "first")
        settings.only("summary_use_proj", True)
        summary = projection("sequence_summary.summary", sizes.hidden, sizes.hidden, True)
        step = (summary, settings.activation("summary_activation", default="gelu"))
        return ClassifierHead("first", (step, (projection("classifier", sizes.hidden, 1, True), None)), choices=True)

    model = encoder(
        settings,
        sizes,
        embedding,
        post_norm_layers(settings, sizes, f"{root}encoder.layer", BERT_NAMES, activation, epsilon),
        before=(projection("classifier.dense", sizes.hidden, sizes.hidden, True), "gelu"),
        classifier="classifier.out_proj",
        language=language,
        heads={"multiple-choice": choices},
        head_modules=("sequence_summary",),
    )
    return replace(model, takes_past=True)


ELECTRA = replace(
    BERT,
    names=("electra",),
    embedding="electra.embeddings.word_embeddings",
    head="generator_lm_head",
    ties=(),
    recipe=recipe,
)
