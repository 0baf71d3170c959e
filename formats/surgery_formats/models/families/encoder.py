# SPDX-License-Identifier: Apache-2.0
"""Shared parts of BERT-like encoders: post-norm layers, and heads chosen by the class that saved the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from surgery_formats.models.families.decoder import plain_mlp, projection
from surgery_formats.models.families.recipe import (
    Activation,
    Attention,
    Branch,
    ClassifierHead,
    Embedding,
    Head,
    HiddenHead,
    Layer,
    Model,
    Norm,
    Projection,
)
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes
from surgery_formats.text import show

__all__ = [
    "BERT_NAMES",
    "LayerNames",
    "bert_embedding",
    "encoder",
    "encoder_norm",
    "post_norm_layer",
    "post_norm_layers",
    "read_encoder_sizes",
]


class LayerNames(NamedTuple):
    """Modules of an encoder's layer, below its path: attention, norm of the sum, MLP, norm of the sum."""

    query: str
    key: str
    value: str
    output: str
    attention_norm: str
    up: str
    down: str
    mlp_norm: str


BERT_NAMES = LayerNames(
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)


read_encoder_sizes = partial(
    read_sizes, vocabulary=30522, max_positions=512, hidden=768, inner=3072, layers=12, heads=12, grouped=False
)
"""`read_sizes` with BERT's defaults."""


def encoder_norm(settings: ModelSettings, at: str, epsilon: float) -> Norm:
    """The layer norm of module `at`; files converted from TensorFlow name its parameters ``gamma`` and ``beta``."""
    old = f"{at}.weight" not in settings.names and f"{at}.gamma" in settings.names
    weight, bias = ("gamma", "beta") if old else ("weight", "bias")
    return Norm("layer", f"{at}.{weight}", epsilon, f"{at}.{bias}")


def bert_embedding(
    settings: ModelSettings, root: str, epsilon: float, *, types: bool = True, **others: Any
) -> Embedding:
    """BERT's embedding below `root`, with token types if `types`; `others` are fields of `Embedding`."""
    at = f"{root}embeddings"
    return Embedding(
        f"{at}.word_embeddings.weight",
        positions=f"{at}.position_embeddings.weight",
        types=f"{at}.token_type_embeddings.weight" if types else "",
        norm=encoder_norm(settings, f"{at}.LayerNorm", epsilon),
        **others,
    )


def post_norm_layers(
    settings: ModelSettings,
    sizes: Sizes,
    stack: str,
    names: LayerNames,
    activation: Activation,
    epsilon: float,
    **attention: Any,
) -> Iterator[Layer]:
    """The layers in module `stack`; `attention` are further fields of their attention."""
    for index in range(sizes.layers):
        yield post_norm_layer(settings, sizes, f"{stack}.{index}", names, activation, epsilon, **attention)


def post_norm_layer(
    settings: ModelSettings,
    sizes: Sizes,
    module: str,
    names: LayerNames,
    activation: Activation,
    epsilon: float,
    **attention: Any,
) -> Layer:
    """Attention, norm of the sum, MLP, norm of the sum; every projection has a bias."""
    at = LayerNames(*(f"{module}.{name}" for name in names))
    q, k, v, output = (projection(name, sizes.hidden, sizes.hidden, True) for name in at[:4])
    scale = sizes.head_dim**-0.5
    return Layer(
        Attention((q, k, v), output, sizes.heads, sizes.heads, sizes.head_dim, **{"scale": scale, **attention}),
        Branch(on_sum=encoder_norm(settings, at.attention_norm, epsilon)),
        plain_mlp(at.up, at.down, sizes, activation),
        Branch(on_sum=encoder_norm(settings, at.mlp_norm, epsilon)),
    )


def encoder(
    settings: ModelSettings,
    sizes: Sizes,
    embedding: Embedding,
    layers: Iterator[Layer],
    *,
    before: tuple[Projection, Activation],
    classifier: str = "classifier",
    pooler: Projection | None = None,
) -> Model:
    """Assemble the encoder, with the head chosen by ``architectures``, then check the settings that nobody read.

    `before` is the first step of a sequence classifier, `classifier` the module of its last; `pooler` is the family's,
    whether the file has it or not, None if the family has none.

    Raises:
        FitError: a decoder, another task's head, non-absolute positions, or an unread setting
            that may change the computation.
    """
    settings.only("is_decoder", False)
    settings.only("add_cross_attention", False)
    settings.only("position_embedding_type", "absolute")
    settings.raw("quantization_config", "compression_config")  # how weights are stored: their readers see to it
    classes = settings.architectures()
    has_pooler = pooler is not None and pooler.weight in settings.names
    head: Head
    if any(name.endswith("ForSequenceClassification") for name in classes):
        head = ClassifierHead("first", (before, (projection(classifier, sizes.hidden, _labels(settings), True), None)))
    elif any(name.endswith("ForTokenClassification") for name in classes):
        head = ClassifierHead("every", ((projection("classifier", sizes.hidden, _labels(settings), True), None),))
    elif any(name.endswith("Model") for name in classes) or (not classes and "classifier.weight" not in settings.names):
        head = HiddenHead(pooler if has_pooler else None)
    else:
        raise settings.fault(
            f"architectures is {show(', '.join(classes) or 'missing', 80)}; supported are sequence and token "
            "classification, and the bare encoder"
        )
    used = {head.pooler} if isinstance(head, HiddenHead) else {step for step, _ in head.steps}
    unused = {}
    if pooler is not None and has_pooler and pooler not in used:
        stored = (name for name in (pooler.weight, pooler.bias) if name in settings.names)
        unused = dict.fromkeys(stored, "the head does not read the pooler")
    settings.finish()
    return Model(
        kind="encoder",
        hidden=sizes.hidden,
        vocabulary=sizes.vocabulary,
        embedding=embedding,
        layers=tuple(layers),
        final_norm=None,
        head=head,
        max_positions=sizes.max_positions - embedding.position_offset,
        unused=unused,
    )


def _labels(settings: ModelSettings) -> int:
    named = settings.mapping("id2label")
    return len(named) if named else settings.count("num_labels", default=2)
