# SPDX-License-Identifier: Apache-2.0
"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT with positions that skip padding, and a two-layer classifier."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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

__all__ = ["FAMILY"]


def recipe(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """Positions are counted from ``pad_token_id + 1`` (arXiv:1907.11692)."""
    settings = ModelSettings(config)
    encoder_only(settings)
    first = settings.text("model_type", default="") == "roberta"
    sizes = read_encoder_sizes(settings, vocabulary=50265 if first else 30522)
    epsilon = settings.positive("layer_norm_eps", default=1e-12)
    padding = settings.whole("pad_token_id", default=1)
    if sizes.positions <= padding + 1:
        raise settings.fault(
            f"max_position_embeddings {sizes.positions} leaves no position after pad_token_id {padding}"
        )
    root = root_of(names, "roberta.", "embeddings.word_embeddings.weight")
    at = f"{root}embeddings"

    def sequence(count: int) -> Steps:
        return (
            (projection("classifier.dense", sizes.hidden, sizes.hidden, True), "tanh"),
            (projection("classifier.out_proj", sizes.hidden, count, True), None),
        )

    return encoder(
        settings,
        names,
        sizes,
        Embedding(
            f"{at}.word_embeddings.weight",
            positions=f"{at}.position_embeddings.weight",
            position_rule="nonpad",
            position_offset=padding + 1,
            padding_token=padding,
            types=f"{at}.token_type_embeddings.weight",
            norm=named_norm(names, f"{at}.LayerNorm", epsilon),
        ),
        bert_layers(settings, names, sizes, root, epsilon),
        sequence=sequence,
        token=lambda count: ((projection("classifier", sizes.hidden, count, True), None),),
        pooler=projection(f"{root}pooler.dense", sizes.hidden, sizes.hidden, True),
        max_positions=sizes.positions - padding - 1,
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
