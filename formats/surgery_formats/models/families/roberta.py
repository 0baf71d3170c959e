# SPDX-License-Identifier: Apache-2.0
"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT with positions that skip padding, and a two-layer classifier."""

from __future__ import annotations

from collections.abc import Iterator
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
from surgery_formats.models.families.recipe import Embedding, LanguageHead, Layer, Model
from surgery_formats.models.families.settings import ModelSettings, Sizes

__all__ = ["FAMILY", "roberta_headed"]


def recipe(settings: ModelSettings) -> Model:
    """Positions are counted from ``pad_token_id + 1`` (arXiv:1907.11692)."""
    first = settings.text("model_type", default="") == "roberta"
    sizes = read_encoder_sizes(settings, vocabulary=50265 if first else 30522)
    epsilon = settings.positive("layer_norm_eps", default=1e-12)
    activation = settings.activation("hidden_act", default="gelu")
    padding = settings.whole("pad_token_id", default=1)
    if sizes.max_positions <= padding + 1:
        raise settings.fault(
            f"max_position_embeddings {sizes.max_positions} leaves no position after pad_token_id {padding}"
        )
    root = root_of(settings, "roberta.", "embeddings.word_embeddings.weight")
    embedding = bert_embedding(
        settings, root, epsilon, position_rule="nonpad", position_offset=padding + 1, padding_token=padding
    )
    layers = post_norm_layers(settings, sizes, f"{root}encoder.layer", BERT_NAMES, activation, epsilon)
    return replace(roberta_headed(settings, sizes, root, embedding, layers, epsilon), takes_past=True)


def roberta_headed(
    settings: ModelSettings,
    sizes: Sizes,
    root: str,
    embedding: Embedding,
    layers: Iterator[Layer],
    epsilon: float,
    *,
    choices: bool = True,
) -> Model:
    """The encoder with RoBERTa's heads: a classifier of two layers, and ``lm_head``; `choices` tells whether it scores choices.

    Raises:
        FitError: as `encoder`.
    """
    pooler = projection(f"{root}pooler.dense", sizes.hidden, sizes.hidden, True)

    def language() -> LanguageHead:
        norm = encoder_norm(settings, "lm_head.layer_norm", epsilon)
        return language_head(settings, sizes, embedding.tokens, "lm_head.dense", norm, "lm_head.decoder", "gelu")

    return encoder(
        settings,
        sizes,
        embedding,
        layers,
        before=(projection("classifier.dense", sizes.hidden, sizes.hidden, True), "tanh"),
        classifier="classifier.out_proj",
        pooler=pooler,
        choice=(pooler, "tanh") if choices else None,
        language=language,
    )


FAMILY = Family(
    names=("roberta", "xlm-roberta", "camembert"),
    embedding="roberta.embeddings.word_embeddings",
    head="lm_head.decoder",
    tied=True,
    ties=(("lm_head.decoder.bias", "lm_head.bias"),),
    derivable=("embeddings.position_ids", "embeddings.token_type_ids"),
    recipe=recipe,
)
