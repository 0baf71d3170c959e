# SPDX-License-Identifier: Apache-2.0
"""What a model computes, as data: which components in which order, and which tensors they take.

A family's recipe is a function from config.json to a `Model` in which nothing is left to decide: every size is a number, every tensor has
its name. The graph exporter and the reference that proves its output read the same record and share nothing else.

Names are those of the family's own checkpoints; `surgery_formats.models.names` finds them in files of another era.

Shapes in this module: ``B`` batch, ``S`` new tokens, ``T`` past and new tokens, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "MLP",
    "Activation",
    "Attention",
    "Branch",
    "ClassifierHead",
    "Embedding",
    "Head",
    "HiddenHead",
    "LanguageHead",
    "Layer",
    "Model",
    "Norm",
    "Projection",
    "Recipe",
    "Rope",
]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "tanh"]
"""``gelu`` is exact (erf); ``gelu_tanh`` the approximation of Hendrycks and Gimpel 2016 (arXiv:1606.08415), ``gelu_new`` in old configs."""


@dataclass(frozen=True, slots=True)
class Projection:
    """``y = x W^T + b``.

    Attributes:
        weight: Tensor ``(outputs, inputs)``, or ``(inputs, outputs)`` where `transposed` (Conv1D).
        inputs: Columns.
        outputs: Rows.
        bias: Tensor ``(outputs,)``, or empty.
        transposed: How it is stored.
    """

    weight: str
    inputs: int
    outputs: int
    bias: str = ""
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Norm:
    """Normalisation over the last axis, in float32.

    Attributes:
        kind: ``rms``: ``x / sqrt(mean(x^2) + epsilon) * g`` (arXiv:1910.07467); ``layer``: with mean and optional bias (arXiv:1607.06450).
        weight: Tensor ``g``, or empty for none (OLMo 1).
        epsilon: Added to the mean square or variance.
        bias: Tensor, or empty.
        plus_one: The gain is ``1 + g`` (Gemma).
    """

    kind: Literal["rms", "layer"]
    weight: str
    epsilon: float
    bias: str = ""
    plus_one: bool = False


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (arXiv:2104.09864) on the first `dims` values of every head, halves paired (``x[i], x[i + dims/2]``).

    Attributes:
        dims: Rotated values per head; less than ``head_dim`` where partial.
        parameters: ``rope_type`` (``default``, ``linear``, ``dynamic``, ``yarn``, ``llama3``, ``longrope``), ``rope_theta`` and what the
            type needs, as in transformers 5; configs of transformers 4 are brought to this form.
        max_positions: ``max_position_embeddings``.
    """

    dims: int
    parameters: Mapping[str, Any]
    max_positions: int


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention ``softmax(scale q k^T + mask) v`` (arXiv:2305.13245), causal in decoders.

    Attributes:
        inputs: q, k and v, or one projection that makes all three.
        layout: How one projection's output is laid out: ``separate`` for three; ``concatenated`` ``[q | k | v]``; ``by_head``
            ``[head 0: q k v | head 1: q k v ...]`` (GPT-NeoX).
        output: Back to ``D``.
        heads: Of queries.
        kv_heads: Of keys and values.
        head_dim: Values per head.
        scale: Of the scores.
        rope: Rotary positions; None for none (GPT-2, layers of SmolLM3).
        window: Keys a query sees, itself included; None for all.
        softcap: ``c tanh(scores / c)`` before the mask; None for none.
        q_norm: Of queries before rotation, or None.
        k_norm: Of keys.
        norm_over: What those norms see: each ``head`` with one gain for all, each head with a gain of its own (``heads``: the weight's
            name holds ``{h}``), or all heads at once (``width``, OLMo 2).
    """

    inputs: tuple[Projection, ...]
    output: Projection
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    layout: Literal["separate", "concatenated", "by_head"] = "separate"
    rope: Rope | None = None
    window: int | None = None
    softcap: float | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_over: Literal["head", "heads", "width"] = "head"


@dataclass(frozen=True, slots=True)
class MLP:
    """``down(act(up x))``, or gated ``down(act(gate x) * up x)``.

    Attributes:
        inputs: ``(up,)``; ``(gate, up)``; or one that makes ``[gate | up]`` where `gated`.
        output: Down.
        activation: Of the gate, or of the only input.
        gated: Whether there is a gate.
    """

    inputs: tuple[Projection, ...]
    output: Projection
    activation: Activation
    gated: bool


@dataclass(frozen=True, slots=True)
class Branch:
    """One residual step: ``x + multiplier * after(body(before(x)))``, then `on_sum` of that.

    Attributes:
        before: Norm of the branch's input (pre-norm models).
        after: Norm of the branch's output, before it is added (Gemma 2, OLMo 2).
        on_sum: Norm of the sum (post-norm models: BERT).
        multiplier: Of the branch (Granite).
    """

    before: Norm | None = None
    after: Norm | None = None
    on_sum: Norm | None = None
    multiplier: float = 1.0


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP.

    Attributes:
        attention: The first body.
        attention_branch: Norms around it.
        mlp: The second body.
        mlp_branch: Norms around it.
        parallel: Both bodies read the layer's input, and both are added to it (GPT-NeoX). A `mlp_branch` without norms then reads what
            the attention reads (StableLM).
    """

    attention: Attention
    attention_branch: Branch
    mlp: MLP
    mlp_branch: Branch
    parallel: bool = False


@dataclass(frozen=True, slots=True)
class Embedding:
    """Token ids to the first hidden state ``(B, S, D)``.

    Attributes:
        tokens: Tensor ``(V, D)``.
        positions: Learned positions ``(P, D)``, or empty.
        position_rule: ``absolute``: past length plus place; ``mask``: ``cumsum(attention_mask) - 1`` (OPT); ``nonpad``: as ``mask``, over
            tokens that are not `padding_token`, which stay at its own position (RoBERTa).
        position_offset: First row used (2 for OPT, ``padding_idx + 1`` for RoBERTa).
        padding_token: For ``nonpad``.
        types: Token types ``(types, D)``, or empty.
        scale: Rows are multiplied by it.
        scale_rounded: Whether `scale` is part of the table, rounded to the stored type (Gemma: ``sqrt(D)``), so that rows from elsewhere
            are not scaled; Granite's is applied to whatever comes.
        norm: After the sum (BERT), or None.
        projection: After the rows (OPT-350m), or None.
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


@dataclass(frozen=True, slots=True)
class LanguageHead:
    """``logits (B, S, V)``.

    Attributes:
        projection: Onto the vocabulary; its weight is the embedding's where tied.
        before: Projection before it (OPT-350m), or None.
        softcap: ``c tanh(logits / c)`` (Gemma 2), or None.
        divisor: Logits are divided by it (Granite).
    """

    projection: Projection
    before: Projection | None = None
    softcap: float | None = None
    divisor: float = 1.0


@dataclass(frozen=True, slots=True)
class ClassifierHead:
    """``logits (B, labels)`` of the first token, or ``(B, S, labels)`` of every token.

    Attributes:
        tokens: ``first`` or ``every``.
        steps: ``(projection, activation)`` in order; an activation of None is none. BERT's pooler is the first step.
    """

    tokens: Literal["first", "every"]
    steps: tuple[tuple[Projection, Activation | None], ...]


@dataclass(frozen=True, slots=True)
class HiddenHead:
    """``last_hidden_state (B, S, D)``, and ``pooler_output (B, D)`` where there is a pooler: a sentence encoder.

    Attributes:
        pooler: Projection of the first token, then tanh; or None.
    """

    pooler: Projection | None = None


Head = LanguageHead | ClassifierHead | HiddenHead


@dataclass(frozen=True, slots=True)
class Model:
    """All of it.

    Attributes:
        kind: ``decoder``: causal, with a cache of keys and values; ``encoder``: every token sees every other.
        hidden: ``D``.
        vocabulary: ``V``, rows of the token table.
        embedding: First.
        layers: In order.
        final_norm: After the last layer, or None.
        head: Last.
        max_positions: Longest sequence it was made for.
        unused: Tensors that rightly take no part, with the reason (a pooler whose output the head does not read).
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


Recipe = Callable[[Mapping[str, Any], Collection[str]], Model]
"""``recipe(config, names)``: `names` are those the checkpoint has, for parts that only the file tells of (an optional bias, a prefix that
files of a bare model lack). Raises `FitError` naming the switch of the configuration that it does not know."""
