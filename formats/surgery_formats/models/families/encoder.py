# SPDX-License-Identifier: Apache-2.0
"""Shared parts of BERT-like encoders: post-norm layers, and heads chosen by the class that saved the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

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
from surgery_formats.models.families.settings import LAYERS, ModelSettings
from surgery_formats.text import show

__all__ = [
    "EncoderSizes",
    "bert_layers",
    "encoder",
    "encoder_only",
    "labels",
    "named_norm",
    "post_norm_layer",
    "read_encoder_sizes",
]

Steps = tuple[tuple[Projection, Activation | None], ...]


@dataclass(frozen=True, slots=True)
class EncoderSizes:
    """The validated sizes of an encoder.

    Attributes:
        hidden: ``D``.
        inner: Width of the MLP.
        layers: Number of layers.
        heads: Number of attention heads; divides `hidden`.
        vocabulary: ``V``.
        positions: Rows of the position table.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    positions: int


def read_encoder_sizes(settings: ModelSettings, *, vocabulary: int = 30522) -> EncoderSizes:
    """Read sizes under BERT's keys, with BERT's defaults.

    Args:
        settings: The model's settings.
        vocabulary: The family's ``vocab_size``.

    Raises:
        FitError: a size is invalid, or the heads do not divide.
    """
    sizes = EncoderSizes(
        hidden=settings.count("hidden_size", default=768),
        inner=settings.count("intermediate_size", default=3072),
        layers=settings.count("num_hidden_layers", default=12, most=LAYERS),
        heads=settings.count("num_attention_heads", default=12),
        vocabulary=settings.count("vocab_size", default=vocabulary),
        positions=settings.count("max_position_embeddings", default=512),
    )
    if sizes.hidden % sizes.heads:
        raise settings.fault(f"hidden_size {sizes.hidden} is not a multiple of num_attention_heads {sizes.heads}")
    return sizes


def encoder_only(settings: ModelSettings) -> None:
    """Refuse everything but a plain encoder.

    Raises:
        FitError: a decoder, attention to another encoder, non-absolute positions, or a quantised checkpoint.
    """
    settings.only("is_decoder", False)
    settings.only("add_cross_attention", False)
    settings.only("position_embedding_type", "absolute")
    settings.only("quantization_config")


def named_norm(names: Collection[str], at: str, epsilon: float) -> Norm:
    """The layer norm of module `at`; files converted from TensorFlow name its parameters ``gamma`` and ``beta``."""
    old = f"{at}.weight" not in names and f"{at}.gamma" in names
    weight, bias = ("gamma", "beta") if old else ("weight", "bias")
    return Norm("layer", f"{at}.{weight}", epsilon, f"{at}.{bias}")


def post_norm_layer(
    sizes: EncoderSizes,
    qkv: tuple[str, str, str],
    output: str,
    up: str,
    down: str,
    norms: tuple[Norm, Norm],
    activation: Activation,
) -> Layer:
    """Attention, norm of the sum, MLP, norm of the sum; every projection has a bias.

    Args:
        sizes: The model's sizes.
        qkv: Modules of queries, keys and values.
        output: Module after the attention.
        up: First module of the MLP.
        down: Second module of the MLP.
        norms: Norms after the attention and after the MLP.
        activation: Activation of the MLP.
    """
    head_dim = sizes.hidden // sizes.heads
    q, k, v = (projection(name, sizes.hidden, sizes.hidden, True) for name in qkv)
    return Layer(
        Attention(
            inputs=(q, k, v),
            output=projection(output, sizes.hidden, sizes.hidden, True),
            heads=sizes.heads,
            kv_heads=sizes.heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
        ),
        Branch(on_sum=norms[0]),
        plain_mlp(up, down, sizes.hidden, sizes.inner, activation),
        Branch(on_sum=norms[1]),
    )


def bert_layers(
    settings: ModelSettings, names: Collection[str], sizes: EncoderSizes, root: str, epsilon: float
) -> list[Layer]:
    """The layers under BERT's names, below `root`."""
    activation = settings.activation("hidden_act", default="gelu")

    def layer(index: int) -> Layer:
        at = f"{root}encoder.layer.{index}"
        return post_norm_layer(
            sizes,
            (f"{at}.attention.self.query", f"{at}.attention.self.key", f"{at}.attention.self.value"),
            f"{at}.attention.output.dense",
            f"{at}.intermediate.dense",
            f"{at}.output.dense",
            (
                named_norm(names, f"{at}.attention.output.LayerNorm", epsilon),
                named_norm(names, f"{at}.output.LayerNorm", epsilon),
            ),
            activation,
        )

    return [layer(index) for index in range(sizes.layers)]


def labels(settings: ModelSettings) -> int:
    """Number of labels: the length of ``id2label``, else ``num_labels``, else 2."""
    named = settings.mapping("id2label")
    return len(named) if named else settings.count("num_labels", default=2)


def encoder(
    settings: ModelSettings,
    names: Collection[str],
    sizes: EncoderSizes,
    embedding: Embedding,
    layers: Iterable[Layer],
    *,
    sequence: Callable[[int], Steps],
    token: Callable[[int], Steps],
    pooler: Projection | None,
    max_positions: int,
) -> Model:
    """Assemble the encoder, with the head chosen by ``architectures``, then check the settings that nobody read.

    Args:
        settings: The model's settings; the rest must have been read.
        names: Tensor names of the checkpoint.
        sizes: The model's sizes.
        embedding: The token embedding.
        layers: The layers, in order.
        sequence: Maps the number of labels to the steps of a sequence classifier.
        token: The same for a token classifier.
        pooler: The family's pooler, whether the file has it or not; None if the family has none.
        max_positions: Longest sequence.

    Raises:
        FitError: another task's head, or an unread setting that may change the computation.
    """
    classes = settings.architectures()
    has_pooler = pooler is not None and pooler.weight in names
    head: Head
    if any(name.endswith("ForSequenceClassification") for name in classes):
        head = ClassifierHead("first", sequence(labels(settings)))
    elif any(name.endswith("ForTokenClassification") for name in classes):
        head = ClassifierHead("every", token(labels(settings)))
    elif any(name.endswith("Model") for name in classes) or (not classes and "classifier.weight" not in names):
        head = HiddenHead(pooler if has_pooler else None)
    else:
        raise settings.fault(
            f"architectures is {show(', '.join(classes) or 'missing', 80)}; supported are sequence and token "
            "classification, and the bare encoder"
        )
    used = {head.pooler} if isinstance(head, HiddenHead) else {step for step, _ in head.steps}
    unused = {}
    if pooler is not None and has_pooler and pooler not in used:
        unused = {name: "the head does not read the pooler" for name in (pooler.weight, pooler.bias) if name in names}
    settings.finish()
    return Model(
        kind="encoder",
        hidden=sizes.hidden,
        vocabulary=sizes.vocabulary,
        embedding=embedding,
        layers=tuple(layers),
        final_norm=None,
        head=head,
        max_positions=max_positions,
        unused=unused,
    )
