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
    "Attention",
    "Bottleneck",
    "BottleneckForm",
    "Branch",
    "ClassifierHead",
    "Coupling",
    "Embedding",
    "Experts",
    "Head",
    "HiddenHead",
    "LanguageHead",
    "Latent",
    "Layer",
    "Model",
    "Norm",
    "Projection",
    "RelativeBias",
    "Rope",
]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (arXiv:2104.09864) on the first `dims` values of each head, in halves (``x[i], x[i + dims/2]``).

    Attributes:
        dims: Rotated values per head; fewer than ``head_dim`` if partial.
        parameters: ``rope_type`` (``default``, ``linear``, ``dynamic``, ``yarn``, ``llama3``, ``longrope``),
            ``rope_theta`` and the parameters of the type, as in transformers 5; older configs are converted.
        max_positions: ``max_position_embeddings``.
        interleaved: Whether neighbours ``x[2 i], x[2 i + 1]`` are a pair.
    """

    dims: int
    parameters: Mapping[str, Any]
    max_positions: int
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Latent:
    """Keys and values from a small vector per token (multi-head latent attention, arXiv:2405.04434).

    The layer's inputs are maps to the queries, or to what `query` makes them of, and to ``[c | r]``. ``key_value(norm c)`` is
    ``[k | v]`` for each head; ``r`` is rotated and shared by all heads. A head's query and key are ``[plain | rotated]``.

    Attributes:
        norm: Norm of ``c``.
        key_value: ``c`` to keys and values.
        plain: Values of a head's key that are not rotated.
        values: Values of a head's ``v``.
        query_norm: Norm before `query`.
        query: The second map of the queries, or None.
    """

    norm: Norm
    key_value: Projection
    plain: int
    values: int
    query_norm: Norm | None = None
    query: Projection | None = None


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
            ``by_head`` ``[head 0: q k v | head 1: q k v ...]`` (GPT-NeoX); ``latent``, see `latent`.
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
            the weight's name contains ``{h}``), or all heads at once (``width``, OLMo 2).
        sinks: Tensor ``(heads,)``: the score of one more key, which has no value, per head (GPT-OSS); or empty.
        latent: How queries, keys and values are made, or None.
        bias: Relative positions (T5, MPNet), or None.
    """

    inputs: tuple[Projection, ...]
    output: Projection
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    layout: Literal["separate", "concatenated", "by_head", "latent"] = "separate"
    rope: Rope | None = None
    window: int | None = None
    softcap: float | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_over: Literal["head", "heads", "width"] = "head"
    sinks: str = ""
    latent: Latent | None = None
    bias: RelativeBias | None = None


@dataclass(frozen=True, slots=True)
class MLP:
    """``down(act(up x))``, or gated ``down(act(gate x) * up x)``.

    Attributes:
        inputs: ``(up,)``; ``(gate, up)``; or one projection for ``[gate | up]`` if `gated`.
        output: The down projection.
        activation: Activation of the gate, or of the only input.
        gated: Whether there is a gate.
        interleaved: Whether gate and up alternate in the output of their one projection.
        limit: The gate is at most this before its activation, and ``up`` at most this in size; None for no limit.
        up_plus: Added to ``up`` (GPT-OSS: 1).
    """

    inputs: tuple[Projection, ...]
    output: Projection
    activation: Activation
    gated: bool
    interleaved: bool = False
    limit: float | None = None
    up_plus: float = 0.0


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
        inserted: Networks of adapters between body and sum, in order.
    """

    before: Norm | None = None
    after: Norm | None = None
    on_sum: Norm | None = None
    multiplier: float = 1.0
    inserted: tuple[Bottleneck, ...] = ()


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP, or a mixture of experts, each in its branch.

    Attributes:
        parallel: Whether both read the layer's input and are added to it (GPT-NeoX). A `mlp_branch` without norms then
            reads the attention's normalised input (StableLM).
    """

    attention: Attention
    attention_branch: Branch
    mlp: MLP | Experts
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
