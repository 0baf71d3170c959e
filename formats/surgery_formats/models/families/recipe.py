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
from typing import Any, Literal

from surgery_formats.models.families.recipe_inserted import Bottleneck, BottleneckForm, Coupling
from surgery_formats.models.families.recipe_parts import Activation, Norm, Projection

__all__ = [
    "MLP",
    "Activation",
    "Alibi",
    "Attention",
    "Bottleneck",
    "BottleneckForm",
    "Branch",
    "ClassifierHead",
    "Coupling",
    "Embedding",
    "Head",
    "HiddenHead",
    "LanguageHead",
    "Layer",
    "Model",
    "Norm",
    "PositionScale",
    "Projection",
    "RelativeBias",
    "Rope",
]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (arXiv:2104.09864) on the first `dims` values of each head.

    Attributes:
        dims: Rotated values per head; fewer than ``head_dim`` if partial.
        parameters: ``rope_type`` (``default``, ``linear``, ``dynamic``, ``yarn``, ``llama3``, ``longrope``),
            ``rope_theta`` and the parameters of the type, as in transformers 5; older configs are converted.
        max_positions: ``max_position_embeddings``.
        interleaved: Whether pairs are neighbours (``x[2i], x[2i + 1]``: GPT-J, Cohere, GLM) instead of being ``dims / 2``
            apart (``x[i], x[i + dims/2]``).
    """

    dims: int
    parameters: Mapping[str, Any]
    max_positions: int
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Alibi:
    """A bias on the scores, linear in the position of the key (arXiv:2108.12409): ``scale slope position``.

    A softmax does not notice what is added to a whole row, so the distance to the query does as well as the position.

    Attributes:
        slopes: One per query head.
        scale: Factor on the bias (Falcon scales it with the scores).
        rounded: Whether slope, position and their product are rounded to bfloat16 (Falcon, whatever its type).
    """

    slopes: tuple[float, ...]
    scale: float = 1.0
    rounded: bool = False


@dataclass(frozen=True, slots=True)
class PositionScale:
    """A factor on queries that grows with their position: ``1 + beta log(1 + floor(position / period))`` (Llama 4)."""

    beta: float
    period: int


@dataclass(frozen=True, slots=True)
class RelativeBias:
    """A number for every head and distance, added to the scores (T5, arXiv:1910.10683 section 2.1).

    Distances are counted in indices, padding included, and fall into buckets: half of them hold one distance each, the others
    grow logarithmically up to `max_distance`. Layers that name the same table share it.

    Attributes:
        table: Tensor ``(buckets, heads)``.
        buckets: Number of buckets.
        max_distance: Distance from which on all are one bucket.
        both_ways: Whether half of the buckets are for keys after the query (encoders); otherwise these count as distance 0.
    """

    table: str
    buckets: int = 32
    max_distance: int = 128
    both_ways: bool = True


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention ``softmax(scale q k^T + mask) v`` (arXiv:2305.13245), causal in decoders.

    Attributes:
        inputs: q, k and v, or one projection for all three.
        layout: How one projection's output is laid out: ``separate`` for three; ``concatenated`` ``[q | k | v]``;
            ``by_head`` ``[head 0: q k v | head 1: q k v ...]`` (GPT-NeoX); ``by_group`` ``[group 0: q q ... k v | group 1
            ...]``, a group being the query heads of one key head (Falcon).
        output: Projection back to ``D``.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        head_dim: Values per head.
        scale: Scale of the scores.
        rope: Rotary positions, or None (GPT-2, some layers of SmolLM3).
        window: Number of keys that a query sees, including its own; in an encoder as many on either side; None for all.
        softcap: ``c tanh(scores / c)`` before the mask, or None.
        q_norm: Norm of queries before rotation, or None.
        k_norm: Norm of keys before rotation, or None.
        norm_over: Extent of those norms: each ``head`` with one gain for all, each head with its own gain (``heads``:
            the weight's name contains ``{h}``, or it is a table ``(heads, head_dim)``), or all heads at once (``width``,
            OLMo 2).
        norm_after_rope: Whether those norms come after rotation (HunYuan).
        bias: Relative positions (T5, MPNet), or None.
        alibi: Linear bias on the scores, or None.
        query_scale: Factor on queries by their position, or None.
        clip: Bound on the absolute values of projected queries, keys and values, or None.
    """

    inputs: tuple[Projection, ...]
    output: Projection
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    layout: Literal["separate", "concatenated", "by_head", "by_group"] = "separate"
    rope: Rope | None = None
    window: int | None = None
    softcap: float | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_over: Literal["head", "heads", "width"] = "head"
    norm_after_rope: bool = False
    bias: RelativeBias | None = None
    alibi: Alibi | None = None
    query_scale: PositionScale | None = None
    clip: float | None = None


@dataclass(frozen=True, slots=True)
class MLP:
    """``down(act(up x))``, or gated ``down(act(gate x) * up x)``.

    Attributes:
        inputs: ``(up,)``; ``(gate, up)``; or one projection for ``[gate | up]`` if `gated`.
        output: The down projection.
        activation: Activation of the gate, or of the only input.
        gated: Whether there is a gate.
        shape: Module of the numbers of ``xielu`` (arXiv:2411.13010): ``alpha_p`` and ``alpha_n`` ``(1,)``, ``beta`` and
            ``eps`` ``()``. With ``p = softplus(alpha_p)`` and ``n = beta + softplus(alpha_n)`` it is ``p x^2 + beta x``
            above 0 and ``n (expm1(min(x, eps)) - x) + beta x`` elsewhere. Empty for other activations.
    """

    inputs: tuple[Projection, ...]
    output: Projection
    activation: Activation
    gated: bool
    shape: str = ""


@dataclass(frozen=True, slots=True)
class Branch:
    """A residual step: ``x + multiplier * after(body(before(x)))``, then `on_sum` of the result.

    Attributes:
        before: Norm of the branch's input (pre-norm models).
        after: Norm of the branch's output, before it is added (Gemma 2, OLMo 2).
        on_sum: Norm of the sum (post-norm models: BERT).
        multiplier: Factor on the branch (Granite).
        inserted: Networks of adapters between body and sum, in order.
    """

    before: Norm | None = None
    after: Norm | None = None
    on_sum: Norm | None = None
    multiplier: float = 1.0
    inserted: tuple[Bottleneck, ...] = ()


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP, each in its branch.

    Attributes:
        parallel: Whether both read the layer's input and are added to it (GPT-NeoX). A `mlp_branch` without norms then
            reads the attention's normalised input (StableLM).
    """

    attention: Attention
    attention_branch: Branch
    mlp: MLP
    mlp_branch: Branch
    parallel: bool = False


@dataclass(frozen=True, slots=True)
class Embedding:
    """Maps token ids to the first hidden state ``(B, S, D)``.

    Attributes:
        tokens: Tensor ``(V, D)``.
        positions: Learned positions ``(P, D)``, or empty.
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


@dataclass(frozen=True, slots=True)
class LanguageHead:
    """``logits (B, S, V)``.

    Attributes:
        projection: Projection onto the vocabulary; if tied, its weight is the embedding's.
        before: Projection before it (OPT-350m), or None.
        softcap: ``c tanh(logits / c)`` (Gemma 2), or None.
        divisor: Divisor of the logits (Granite).
        inverted: Networks of adapters that are turned round in front of the projection, in order.
    """

    projection: Projection
    before: Projection | None = None
    softcap: float | None = None
    divisor: float = 1.0
    inverted: tuple[Coupling, ...] = ()


@dataclass(frozen=True, slots=True)
class ClassifierHead:
    """``logits (B, labels)`` of the first token, or ``(B, S, labels)`` of every token.

    Attributes:
        tokens: ``first`` or ``every``.
        steps: ``(projection, activation or None)`` in order. BERT's pooler is the first step.
    """

    tokens: Literal["first", "every"]
    steps: tuple[tuple[Projection, Activation | None], ...]


@dataclass(frozen=True, slots=True)
class HiddenHead:
    """``last_hidden_state (B, S, D)``, and ``pooler_output (B, D)`` if there is a pooler: a sentence encoder.

    Attributes:
        pooler: Projection of the first token, then tanh; or None.
    """

    pooler: Projection | None = None


Head = LanguageHead | ClassifierHead | HiddenHead


@dataclass(frozen=True, slots=True)
class Model:
    """The computation of a whole model.

    Attributes:
        kind: ``decoder``: causal, with a cache of keys and values; ``encoder``: every token sees every other.
        hidden: ``D``.
        vocabulary: ``V``, the rows of the token table.
        final_norm: Norm after the last layer, or None.
        max_positions: Longest sequence the model supports.
        unused: Tensors that are unused by design, with the reason (a pooler that the head does not read).
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

    @property
    def embedded(self) -> tuple[int, int, int]:
        """Values in a row of the token table, in one of positions and types, and in their norm."""
        record = self.embedding
        if record.projection is None:
            return self.hidden, self.hidden, self.hidden
        narrow, last = record.projection.inputs, ("tokens", "sum", "norm").index(record.projected)
        return narrow, narrow if last else self.hidden, narrow if last == 2 else self.hidden
