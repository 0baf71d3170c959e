# SPDX-License-Identifier: Apache-2.0
"""Shared parts of BERT-like encoders: post-norm layers, and heads chosen by the class that saved the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
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
    LanguageHead,
    Layer,
    Model,
    Norm,
    Projection,
    SpanHead,
)
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes
from surgery_formats.models.families.tasks import ENCODER_TASKS, asked_task, head_names, labels, other_heads

__all__ = [
    "BERT_NAMES",
    "LayerNames",
    "bert_embedding",
    "encoder",
    "encoder_norm",
    "language_head",
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
    before: tuple[Projection, Activation] | None = None,
    classifier: str = "classifier",
    pooler: Projection | None = None,
    choice: tuple[Projection, Activation] | None = None,
    language: Callable[[], LanguageHead] | None = None,
    heads: Mapping[str, Callable[[], Head] | None] = MappingProxyType({}),
    head_modules: tuple[str, ...] = (),
    final_norm: Norm | None = None,
) -> Model:
    """Assemble the encoder, with the head chosen by the task, then check the settings that nobody read.

    `before` is the first step of a sequence classifier, `classifier` the module of its last; `choice` is the first step
    where choices are scored. `pooler` is the family's, whether the file has it or not, None if the family
    has none; `language` makes the head that fills masks. `heads` make those that are not BERT's, by task; None for a task
    that the family lacks; `head_modules` are the modules of heads that no other family has.

    Raises:
        FitError: a decoder, a task that encoders do not have, non-absolute positions, or an unread setting
            that may change the computation.
    """
    settings.only("is_decoder", False)
    settings.only("add_cross_attention", False)
    settings.only("position_embedding_type", "absolute")
    settings.raw("quantization_config", "compression_config")  # how weights are stored: their readers see to it
    absent = {"fill-mask": language is None, "multiple-choice": choice is None, "text-classification": before is None}
    absent |= {task: make is None for task, make in heads.items()}
    known = tuple(task for task in ENCODER_TASKS if not absent.get(task))
    task = asked_task(settings, known, "encoders")
    has_pooler = pooler is not None and pooler.weight in settings.names
    head: Head
    match task:
        case _ if (own := heads.get(task)) is not None:
            head = own()
        case "text-classification" if before is not None:
            head = ClassifierHead(
                "first", (before, (projection(classifier, sizes.hidden, labels(settings), True), None))
            )
        case "multiple-choice" if choice is not None:
            steps = (choice, (projection("classifier", sizes.hidden, 1, True), None))
            head = ClassifierHead("first", steps, choices=True)
        case "token-classification":
            head = ClassifierHead("every", ((projection("classifier", sizes.hidden, labels(settings), True), None),))
        case "question-answering":
            head = SpanHead(projection("qa_outputs", sizes.hidden, 2, True))
        case "fill-mask" if language is not None:
            head = language()
        case _:
            if not task and "classifier.weight" in settings.names:
                raise settings.fault(f"architectures is missing; the tasks of encoders are {', '.join(known)}")
            head = HiddenHead(pooler if has_pooler else None)
    used = head_names(head)
    unused = other_heads(settings, used, head_modules)
    if pooler is not None and pooler.weight not in used:
        stored = (name for name in (pooler.weight, pooler.bias) if name in settings.names)
        unused |= dict.fromkeys(stored, "the head does not read the pooler")
    settings.finish()
    made = tuple(layers)
    if any(one.attention.rope and one.attention.rope.parameters["rope_type"] == "longrope" for one in made):
        raise settings.fault("rope_type is 'longrope', which encoders do not support")
    return Model(
        kind="encoder",
        hidden=sizes.hidden,
        vocabulary=sizes.vocabulary,
        embedding=embedding,
        layers=made,
        final_norm=final_norm,
        head=head,
        max_positions=sizes.max_positions - embedding.position_offset,
        unused=unused,
    )


def language_head(
    settings: ModelSettings,
    sizes: Sizes,
    tokens: str,
    transform: str,
    norm: Norm,
    output: str,
    activation: Activation,
    *,
    width: int | None = None,
) -> LanguageHead:
    """A head that fills masks: `transform`, `activation`, `norm`, then the table of `tokens` with a bias of its own.

    `transform` is a module, and so is `output`, whose weight is used where it is not tied to the table. `width` is that of
    the table's rows, if it is not the layers'.
    """
    tied = settings.flag("tie_word_embeddings", default=True)
    root = output.rpartition(".")[0]
    biases = [f"{root}.bias"] if root else []
    biases.insert(len(biases) if tied else 0, f"{output}.bias")  # one parameter, unless untied: then the output's own
    bias = next((name for name in biases if name in settings.names), biases[-1])
    return LanguageHead(
        Projection(tokens if tied else f"{output}.weight", width or sizes.hidden, sizes.vocabulary, bias),
        projection(transform, sizes.hidden, width or sizes.hidden, True),
        activation=activation,
        norm=norm,
    )
