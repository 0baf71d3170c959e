# SPDX-License-Identifier: Apache-2.0
"""DistilBERT: BERT without token types and pooler, under its own names."""

from __future__ import annotations

from surgery_formats.models.families.decoder import projection, root_of
from surgery_formats.models.families.encoder import (
    LayerNames,
    bert_embedding,
    encoder,
    encoder_norm,
    language_head,
    post_norm_layers,
    read_encoder_sizes,
)
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Activation, LanguageHead, Model, Projection
from surgery_formats.models.families.settings import ModelSettings

__all__ = ["FAMILY"]

_EPSILON = 1e-12  # not in config.json
_NAMES = LayerNames(
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    "sa_layer_norm",
    "ffn.lin1",
    "ffn.lin2",
    "output_layer_norm",
)


def recipe(settings: ModelSettings) -> Model:
    """Sanh et al. 2019, arXiv:1910.01108; ``sinusoidal_pos_embds`` only initialises the stored table."""
    settings.flag("sinusoidal_pos_embds", default=False)
    sizes = read_encoder_sizes(
        settings,
        layers=6,
        hidden_keys=("dim", "hidden_size"),
        inner_keys=("hidden_dim",),
        layers_keys=("n_layers", "num_hidden_layers"),
        heads_keys=("n_heads", "num_attention_heads"),
    )
    activation = settings.activation("activation", default="gelu")
    root = root_of(settings, "distilbert.", "embeddings.word_embeddings.weight")
    layers = post_norm_layers(settings, sizes, f"{root}transformer.layer", _NAMES, activation, _EPSILON)
    before = projection("pre_classifier", sizes.hidden, sizes.hidden, True)
    embedding = bert_embedding(settings, root, _EPSILON, types=False)

    def language() -> LanguageHead:
        norm, dense = encoder_norm(settings, "vocab_layer_norm", _EPSILON), "vocab_transform"
        return language_head(settings, sizes, embedding.tokens, dense, norm, "vocab_projector", activation)

    first: tuple[Projection, Activation] = (before, "relu")
    return encoder(settings, sizes, embedding, layers, before=first, choice=first, language=language)


FAMILY = Family(
    names=("distilbert",),
    embedding="distilbert.embeddings.word_embeddings",
    head="vocab_projector",
    tied=True,
    derivable=("embeddings.position_ids",),
    recipe=recipe,
)
