# SPDX-License-Identifier: Apache-2.0
"""MPNet: RoBERTa's positions, and a bias of the scores by distance that all layers share."""

from __future__ import annotations

from surgery_formats.models.families.decoder import root_of
from surgery_formats.models.families.encoder import LayerNames, bert_embedding, post_norm_layers, read_encoder_sizes
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Model, RelativeBias
from surgery_formats.models.families.roberta import roberta_headed
from surgery_formats.models.families.settings import ModelSettings

__all__ = ["FAMILY"]

_PADDING = 1  # whatever pad_token_id says
_NAMES = LayerNames(
    "attention.attn.q",
    "attention.attn.k",
    "attention.attn.v",
    "attention.attn.o",
    "attention.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)


def recipe(settings: ModelSettings) -> Model:
    """Song et al. 2020, arXiv:2004.09297; transformers has the buckets of T5, whatever the configuration says."""
    sizes = read_encoder_sizes(settings, vocabulary=30527)
    epsilon = settings.positive("layer_norm_eps", default=1e-12)
    activation = settings.activation("hidden_act", default="gelu")
    settings.only("relative_attention_num_buckets", 32)
    settings.whole("pad_token_id", default=_PADDING)
    if sizes.max_positions <= _PADDING + 1:
        raise settings.fault(f"max_position_embeddings {sizes.max_positions} leaves no position after padding's")
    root = root_of(settings, "mpnet.", "embeddings.word_embeddings.weight")
    bias = RelativeBias(f"{root}encoder.relative_attention_bias.weight")
    embedding = bert_embedding(
        settings,
        root,
        epsilon,
        types=False,
        position_rule="nonpad",
        position_offset=_PADDING + 1,
        padding_token=_PADDING,
    )
    layers = post_norm_layers(settings, sizes, f"{root}encoder.layer", _NAMES, activation, epsilon, bias=bias)
    return roberta_headed(settings, sizes, root, embedding, layers, epsilon)


FAMILY = Family(
    names=("mpnet",),
    embedding="mpnet.embeddings.word_embeddings",
    head="lm_head.decoder",
    tied=True,
    ties=(("lm_head.decoder.bias", "lm_head.bias"),),
    derivable=("embeddings.position_ids",),
    recipe=recipe,
)
