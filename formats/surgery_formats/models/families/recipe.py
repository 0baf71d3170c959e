# SPDX-License-Identifier: Apache-2.0
"""What a model computes, as data: its components in order, and the tensors they need.

A family's recipe maps config.json to a `Model` that leaves nothing to decide: every size is a number, every tensor has
its name. The graph exporter and the reference that proves its output both read this record and share nothing else.

Names are those of the family's own checkpoints; `surgery_formats.models.names` maps them to files of other versions.

Shapes in this module: ``B`` batch, ``S`` new tokens, ``T`` past and new tokens, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from surgery_formats.models.families.recipe_altup import AltUp, AltUpLayer, Laurel, LayerEmbeddings, LayerInput
from surgery_formats.models.families.recipe_attention import (
    Alibi,
    Attention,
    Disentangled,
    Latent,
    PositionScale,
    RelativeBias,
    Rope,
    ShortConvolution,
)
from surgery_formats.models.families.recipe_audio import AudioStem, TimeConvolution
from surgery_formats.models.families.recipe_embedding import Embedding
from surgery_formats.models.families.recipe_heads import (
    ClassifierHead,
    Head,
    HiddenHead,
    LanguageHead,
    PooledHead,
    Probe,
    SpanHead,
)
from surgery_formats.models.families.recipe_inserted import Bottleneck, BottleneckForm, Coupling
from surgery_formats.models.families.recipe_mlp import MLP, Experts
from surgery_formats.models.families.recipe_parts import Activation, Norm, Projection, Shapes, norm_shapes
from surgery_formats.models.families.recipe_vision import Patches

__all__ = [
    "MLP",
    "Activation",
    "Alibi",
    "AltUp",
    "AltUpLayer",
    "Attention",
    "AudioStem",
    "Bottleneck",
    "BottleneckForm",
    "Branch",
    "ClassifierHead",
    "Convolution",
    "Coupling",
    "Cross",
    "Disentangled",
    "Embedding",
    "Experts",
    "Head",
    "HiddenHead",
    "LanguageHead",
    "Latent",
    "Laurel",
    "Layer",
    "LayerEmbeddings",
    "LayerInput",
    "Model",
    "Norm",
    "Patches",
    "PooledHead",
    "PositionScale",
    "Probe",
    "Projection",
    "RelativeBias",
    "Rope",
    "ShortConvolution",
    "SpanHead",
    "TimeConvolution",
]


@dataclass(frozen=True, slots=True)
class Branch:
    """A residual step: ``x + multiplier * after(body(before(x)))``, then `on_sum` of the result.

    Attributes:
        before: Norm of the branch's input (pre-norm models).
        after: Norm of the branch's output, before it is added (Gemma 2, OLMo 2).
        on_sum: Norm of the sum (post-norm models: BERT).
        multiplier: Factor on the branch (Granite).
        gains: Tensor ``(D,)`` of factors on the branch, one for each value (DINOv2), or empty.
        inserted: Networks of adapters between body and sum, in order.
    """

    before: Norm | None = None
    after: Norm | None = None
    on_sum: Norm | None = None
    multiplier: float = 1.0
    gains: str = ""
    inserted: tuple[Bottleneck, ...] = ()

    def shapes(self, hidden: int) -> Shapes:
        """The base's tensors in it, in a model of `hidden` values."""
        shapes = norm_shapes(hidden, self.before, self.after, self.on_sum)
        return shapes | ({self.gains: (hidden,)} if self.gains else {})


@dataclass(frozen=True, slots=True)
class Cross:
    """Attention to the encoder's result, in a branch of its own: queries are the decoder's, keys and values the encoder's."""

    attention: Attention
    branch: Branch

    def shapes(self, hidden: int) -> Shapes:
        """Its tensors, in a model of `hidden` values."""
        return self.branch.shapes(hidden) | self.attention.shapes(hidden)


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP, or a mixture of experts, each in its branch.

    Attributes:
        cross: Attention to an encoder's result, between the two; or None.
        parallel: Whether both read the layer's input and are added to it (GPT-NeoX). A `mlp_branch` without norms then
            reads the attention's normalised input (StableLM).
        altup: What happens around both in a model with several streams of hidden states, or None.
    """

    attention: Attention
    attention_branch: Branch
    mlp: MLP | Experts
    mlp_branch: Branch
    parallel: bool = False
    cross: Cross | None = None
    altup: AltUpLayer | None = None

    def shapes(self, hidden: int) -> Shapes:
        """Its tensors, in a model of `hidden` values."""
        shapes = self.attention_branch.shapes(hidden) | self.mlp_branch.shapes(hidden)
        shapes |= self.attention.shapes(hidden) | self.mlp.shapes()
        if self.cross is not None:
            shapes |= self.cross.shapes(hidden)
        return shapes | (self.altup.shapes(hidden) if self.altup else {})


@dataclass(frozen=True, slots=True)
class Convolution:
    """Behind the first layer: ``N(y + act(conv(x)))`` of its result ``y`` and its input ``x``, padding being zero (DeBERTa).

    Attributes:
        weight: Tensor ``(D, D / groups, width)``.
        bias: Tensor ``(D,)``.
        width: Tokens that it sees, an odd number.
        groups: Parts of ``D`` that do not mix.
        activation: Of its result.
        norm: Norm of the sum.
    """

    weight: str
    bias: str
    width: int
    groups: int
    activation: Activation
    norm: Norm

    def shapes(self, hidden: int) -> Shapes:
        """Its tensors, in a model of `hidden` values."""
        shapes: Shapes = {self.weight: (hidden, hidden // self.groups, self.width), self.bias: (hidden,)}
        return shapes | norm_shapes(hidden, self.norm)


@dataclass(frozen=True, slots=True)
class Model:
    """The computation of a whole model.

    Attributes:
        kind: ``decoder``: causal; ``encoder``: every token sees every other.
        hidden: ``D``.
        vocabulary: ``V``, the rows of the token table.
        final_norm: Norm after the last layer, or None.
        max_positions: Longest sequence the model supports.
        unused: Tensors that are unused by design, with the reason (a pooler that the head does not read).
        encoder: What the `cross` of a decoder's layers read the result of, a model of its own; or None.
        convolution: Convolution behind the first layer (DeBERTa), or None.
        altup: Several streams of hidden states, which layers update by turns (Gemma 3n), or None.
        takes_past: Whether an encoder's class takes keys and values in front of every layer's, as prefix tuning gives it them.
        images: How embeddings of images stand among those of a text: ``row``: as any others; ``blocks``: each image's tokens see
            each other (Gemma 3); ``grid``: with places in time, height and width (Qwen2-VL), see `Rope`.
        only_text: Why embeddings of anything but text cannot take the place of tokens; empty if they can.
    """

    kind: Literal["decoder", "encoder"]
    hidden: int
    vocabulary: int
    embedding: Embedding
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    head: Head
    max_positions: int
    unused: Mapping[str, str] = field(default_factory=dict)
    encoder: Model | None = None
    convolution: Convolution | None = None
    altup: AltUp | None = None
    takes_past: bool = False
    images: Literal["row", "blocks", "grid"] = "row"
    only_text: str = ""

    @property
    def caching(self) -> tuple[Layer, ...]:
        """The layers that have keys and values of their own; those that take another's come last."""
        return tuple(layer for layer in self.layers if layer.attention.shared is None)

    @property
    def generates(self) -> bool:
        """Whether it writes token by token, so that keys and values are worth a cache."""
        return self.kind == "decoder" and isinstance(self.head, LanguageHead)

    @property
    def embedded(self) -> tuple[int, int, int]:
        """Values in a row of the token table, in one of positions and types, and in their norm."""
        record = self.embedding
        if record.projection is None:
            return self.hidden, self.hidden, self.hidden
        narrow, last = record.projection.inputs, ("tokens", "sum", "norm").index(record.projected)
        return narrow, narrow if last else self.hidden, narrow if last == 2 else self.hidden
