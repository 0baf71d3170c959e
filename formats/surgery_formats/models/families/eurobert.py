# SPDX-License-Identifier: Apache-2.0
"""EuroBERT: Llama's layers, seen from both sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from surgery_formats.models.families.decoder import attention, llama_layer, projection, rms_norms, root_of
from surgery_formats.models.families.encoder import encoder
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import (
    Attention,
    ClassifierHead,
    Embedding,
    LanguageHead,
    Model,
    Projection,
)
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes
from surgery_formats.models.families.tasks import labels
from surgery_formats.text import show

__all__ = ["FAMILY"]

_POOLINGS: Mapping[str, tuple[Literal["first", "mean"], int]] = {
    "bos": ("first", 0),
    "mean": ("mean", 0),
    "late": ("mean", 1),
}
"""Which tokens are scored, and how many steps every token takes before their mean."""


def recipe(settings: ModelSettings) -> Model:
    """Boizard et al. 2025, arXiv:2503.05500."""
    sizes = read_sizes(settings, vocabulary=128256, max_positions=8192, hidden=768, inner=3072, layers=12, heads=12)
    rope, norm = read_rope(settings, sizes), rms_norms(settings, default=1e-5)
    bias, mlp_bias = (settings.flag(key, default=False) for key in ("attention_bias", "mlp_bias"))
    settings.only("is_causal", False)
    root = root_of(settings, "model.", "embed_tokens.weight")

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=bias)

    layer = llama_layer(settings, sizes, attend, norm, mlp_bias=mlp_bias)
    table = f"{root}embed_tokens.weight"
    pooling = settings.text("classifier_pooling", "clf_pooling", default="late")  # the second in the authors' own code
    if pooling not in _POOLINGS:
        raise settings.fault(f"classifier_pooling is '{show(pooling, 40)}', supported are {', '.join(_POOLINGS)}")
    last = projection("classifier", sizes.hidden, labels(settings), True)

    def scores() -> ClassifierHead:
        tokens, early = _POOLINGS[pooling]
        dense = projection("dense", sizes.hidden, sizes.hidden, True)
        return ClassifierHead(tokens, ((dense, "gelu"), (last, None)), early=early)

    def language() -> LanguageHead:
        tied = settings.flag("tie_word_embeddings", default="lm_head.weight" not in settings.names)
        weight, output_bias = table if tied else "lm_head.weight", "lm_head.bias" if mlp_bias else ""
        return LanguageHead(Projection(weight, sizes.hidden, sizes.vocabulary, output_bias))

    return encoder(
        settings,
        sizes,
        Embedding(table),
        (layer(f"{root}layers.{index}", index) for index in range(sizes.layers)),
        final_norm=norm(f"{root}norm"),
        head_modules=("dense",),
        heads={
            "text-classification": scores,
            "fill-mask": language,
            "question-answering": None,
        },
    )


FAMILY = Family(names=("eurobert",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
