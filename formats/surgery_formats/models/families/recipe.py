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
from surgery_formats.models.families.recipe_inserted import Bottleneck, BottleneckForm, Coupling
from surgery_formats.models.families.recipe_parts import Activation, Norm, Projection
from surgery_formats.models.families.recipe_sentence import SentenceHead
from surgery_formats.models.families.recipe_vision import Patches

__all__ = [
    "MLP",
    "Activation",
    "Alibi",
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
    "Layer",
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
class MLP:
    """``down(act(up x))``, or gated ``down(act(gate x) * up x)``.

    Attributes:
        inputs: ``(up,)``; ``(gate, up)``; or one projection for ``[gate | up]`` if `gated`.
        output: The down projection.
        activation: Activation of the gate, or of the only input.
        gated: Whether there is a gate.
        interleaved: Whether gate and up alternate in the output of their one projection.
        gate_last: Whether their one projection has them as ``[up | gate]``.
        limit: The gate is at most this before its activation, and ``up`` at most this in size; None for no limit.
        up_plus: Added to ``up`` (GPT-OSS: 1).
        shape: Module of the numbers of ``xielu`` (arXiv:2411.13010): ``alpha_p`` and ``alpha_n`` ``(1,)``, ``beta`` and
            ``eps`` ``()``. With ``p = softplus(alpha_p)`` and ``n = beta + softplus(alpha_n)`` it is ``p x^2 + beta x``
            above 0 and ``n (expm1(min(x, eps)) - x) + beta x`` elsewhere. Empty for other activations.
    """

    inputs: tuple[Projection, ...]
    output: Projection
    activation: Activation
    gated: bool
    interleaved: bool = False
    gate_last: bool = False
    limit: float | None = None
    up_plus: float = 0.0
    shape: str = ""


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts (arXiv:2101.03961): ``sum over the chosen e of w_e expert_e(x)``, and the shared expert.

    Scores ``s`` are the softmax or the sigmoid of what the router makes of ``x``. The experts chosen are the `top` with the
    greatest ``s + correction``, of the best groups only; their weights are ``s``.

    Attributes:
        router: ``D`` to one number per expert.
        experts: The experts.
        top: How many are chosen for each token.
        scoring: ``softmax`` over all experts, or ``sigmoid`` of each.
        normalised: Whether the weights of the chosen are divided by their sum, or by `floor` if that is greater.
        floor: See `normalised`.
        scale: Factor on the weights.
        correction: Tensor ``(experts,)``, or ``(1, experts)`` if `correction_row`, that affects the choice alone; or empty.
        correction_row: See `correction`.
        groups: Number of groups of neighbours of equal size.
        best_groups: How many of the groups are considered.
        group_score: A group counts as its ``best`` expert, or as the ``two`` best together.
        precise: Whether the router computes in float32.
        shared: An expert for every token, or None.
        shared_gate: Sigmoid of one number per token on the shared expert (Qwen2-MoE), or None.
    """

    router: Projection
    experts: tuple[MLP, ...]
    top: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    floor: float = 0.0
    scale: float = 1.0
    correction: str = ""
    correction_row: bool = False
    groups: int = 1
    best_groups: int = 1
    group_score: Literal["best", "two"] = "best"
    precise: bool = False
    shared: MLP | None = None
    shared_gate: Projection | None = None


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


@dataclass(frozen=True, slots=True)
class Cross:
    """Attention to the encoder's result, in a branch of its own: queries are the decoder's, keys and values the encoder's."""

    attention: Attention
    branch: Branch


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP, or a mixture of experts, each in its branch.

    Attributes:
        cross: Attention to an encoder's result, between the two; or None.
        parallel: Whether both read the layer's input and are added to it (GPT-NeoX). A `mlp_branch` without norms then
            reads the attention's normalised input (StableLM).
    """

    attention: Attention
    attention_branch: Branch
    mlp: MLP | Experts
    mlp_branch: Branch
    parallel: bool = False
    cross: Cross | None = None


@dataclass(frozen=True, slots=True)
class Embedding:
    """Maps token ids to the first hidden state ``(B, S, D)``.

    Attributes:
        tokens: Tensor ``(V, D)``; empty for an encoder of sound or of images.
        positions: Learned positions ``(P, D)``, or empty.
        sinusoid: Rows of a table of positions that no file holds, sines in the first half of a row, cosines in the second
            (arXiv:1706.03762, as Marian has them); 0 for none.
        position_rule: ``absolute``: past length plus index; ``mask``: ``cumsum(attention_mask) - 1`` (OPT); ``nonpad``:
            as ``mask``, over tokens other than `padding_token`, which has its own position (RoBERTa).
        position_offset: First row used (2 for OPT, ``padding_idx + 1`` for RoBERTa).
        padding_token: For ``nonpad``.
        types: Token types ``(types, D)``, or empty.
        scale: Factor on the rows.
        scale_rounded: Whether `scale` is part of the table, rounded to the stored type (Gemma: ``sqrt(D)``), so that
            embeddings from elsewhere are not scaled; Granite scales all inputs.
        norm: Norm of the sum (BERT), or None.
        projection: Projection of narrower rows to ``D``, or None.
        projected: What it projects: rows of ``tokens`` (OPT-350m), the ``sum`` of all rows (DeBERTa), or its ``norm``
            (ALBERT, ELECTRA).
        couplings: Networks of adapters on the first hidden state, in order.
        stem: What makes the first hidden state of a spectrogram instead of tokens (Whisper), or None.
        patches: What makes the first hidden state of an image instead of tokens (ViT), or None.
    """

    tokens: str
    positions: str = ""
    position_rule: Literal["absolute", "mask", "nonpad"] = "absolute"
    position_offset: int = 0
    padding_token: int = 0
    types: str = ""
    scale: float = 1.0
    scale_rounded: bool = False
    norm: Norm | None = None
    projection: Projection | None = None
    projected: Literal["tokens", "sum", "norm"] = "tokens"
    couplings: tuple[Coupling, ...] = ()
    sinusoid: int = 0
    stem: AudioStem | None = None
    patches: Patches | None = None


@dataclass(frozen=True, slots=True)
class LanguageHead:
    """``logits (B, S, V)``, of the next token in a decoder, of a masked one in an encoder.

    Attributes:
        projection: Projection onto the vocabulary; if tied, its weight is the embedding's.
        before: Projection before it (OPT-350m, BERT), or None.
        softcap: ``c tanh(logits / c)`` (Gemma 2), or None.
        divisor: Divisor of the logits (Granite).
        inverted: Networks of adapters that are turned round in front of the projection, in order.
        activation: Of the result of `before` (BERT), or None.
        norm: Norm of it, or None.
        bias: Tensor ``(1, V)`` added to the logits (BART), or empty.
    """

    projection: Projection
    before: Projection | None = None
    softcap: float | None = None
    divisor: float = 1.0
    inverted: tuple[Coupling, ...] = ()
    activation: Activation | None = None
    norm: Norm | None = None
    bias: str = ""


@dataclass(frozen=True, slots=True)
class ClassifierHead:
    """``logits (B, labels)`` of one token of each row, or ``(B, S, labels)`` of every token.

    Attributes:
        tokens: ``first``, ``every``, ``last``: the rightmost one whose id is not `padding_token`, or the ``mean`` of all that
            are no padding; of an image the mean of its ``patches``, or ``[first | that mean]`` (``first_and_patches``).
        steps: ``(projection, activation or None)`` in order. BERT's pooler is the first step.
        padding_token: For ``last``; without one rows have no padding, so there is only one row.
        choices: Whether rows are the choices of questions, ``(B, C, S)``, each with one score: ``logits (B, C)``.
        early: Number of steps that every token takes before their mean (EuroBERT).
        norm: Norm in front of the last step (ModernBERT), or None.
    """

    tokens: Literal["first", "every", "last", "mean", "patches", "first_and_patches"]
    steps: tuple[tuple[Projection, Activation | None], ...]
    padding_token: int | None = None
    choices: bool = False
    early: int = 0
    norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class SpanHead:
    """``start_logits (B, S)`` and ``end_logits (B, S)``: where an answer begins and where it ends.

    Attributes:
        projection: ``D`` to two values.
        before: Projection in front of it, and its activation (ModernBERT), or None.
        norm: Norm of their result, or None.
    """

    projection: Projection
    before: tuple[Projection, Activation] | None = None
    norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class HiddenHead:
    """``last_hidden_state (B, S, D)``, and ``pooler_output (B, D)`` if there is a pooler: a model without a head.

    Attributes:
        pooler: Projection of the first token, then tanh; or None.
    """

    pooler: Projection | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """Attention of one learned query to all tokens, with a residual MLP behind it (SigLIP, arXiv:2303.15343).

    Attributes:
        query: Tensor ``(1, 1, D)``.
        inputs: ``[q | k | v]`` of all.
        output: Projection of the result.
        heads: Number of heads.
        norm: Norm before the MLP.
        mlp: Its result is added to what it reads the norm of.
    """

    query: str
    inputs: Projection
    output: Projection
    heads: int
    norm: Norm
    mlp: MLP


@dataclass(frozen=True, slots=True)
class PooledHead:
    """``last_hidden_state (B, S, D)``, and one vector of each row: an encoder of images, or of texts about them.

    Attributes:
        output: Name of the vector's output: ``pooler_output``, ``image_embeds`` or ``text_embeds``.
        token: Whose state it is: the ``first``, the ``last``, padding or not, the first with the id `end` (``end``), or that
            with the greatest id (``greatest``: CLIP before its configuration named the right id).
        end: See `token`.
        norm: Norm of that state, or None.
        projection: Projection of it, or None.
        probe: What makes the vector instead of one token's state, or None.
    """

    output: str
    token: Literal["first", "last", "end", "greatest"] = "first"
    end: int = 0
    norm: Norm | None = None
    projection: Projection | None = None
    probe: Probe | None = None


Head = LanguageHead | ClassifierHead | SpanHead | HiddenHead | SentenceHead | PooledHead


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
    only_text: str = ""

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
