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
    "Rope",
]

Activation = Literal[
    "silu", "gelu", "gelu_tanh", "relu", "tanh", "sigmoid", "leaky_relu", "quick_gelu", "linear", "relu2", "xielu"
]
"""``gelu`` is exact (erf); ``gelu_tanh``, ``gelu_new`` in old configs, is the approximation of arXiv:1606.08415. ``sigmoid`` to
``linear`` are those of inserted modules; ``leaky_relu`` has the slope 0.01, ``quick_gelu`` is ``x sigmoid(1.702 x)``.
``relu2`` is ``relu(x)^2`` (arXiv:2109.08668), ``xielu`` has learned numbers (see `MLP`)."""


@dataclass(frozen=True, slots=True)
class Projection:
    """``y = x W^T + b``.

    Attributes:
        weight: Tensor ``(outputs, inputs)``, or ``(inputs, outputs)`` if `transposed` (Conv1D).
        bias: Tensor ``(outputs,)``, or empty.
        transposed: Whether the weight is stored ``(inputs, outputs)``.
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
        kind: ``rms``: ``x / sqrt(mean(x^2) + epsilon) * g`` (arXiv:1910.07467); ``layer``: with mean and optional bias
            (arXiv:1607.06450).
        weight: Tensor ``g``, or empty (OLMo 1).
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
        window: Number of keys that a query sees, including its own; None for all.
        softcap: ``c tanh(scores / c)`` before the mask, or None.
        q_norm: Norm of queries before rotation, or None.
        k_norm: Norm of keys before rotation, or None.
        norm_over: Extent of those norms: each ``head`` with one gain for all, each head with its own gain (``heads``:
            the weight's name contains ``{h}``, or it is a table ``(heads, head_dim)``), or all heads at once (``width``,
            OLMo 2).
        norm_after_rope: Whether those norms come after rotation (HunYuan).
        alibi: Bias on the scores, or None.
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
class BottleneckForm:
    """How a bottleneck computes; see `Bottleneck` for what the letters mean.

    Attributes:
        activation: Of the inner values.
        parallel: Whether it reads ``x``, and ``h`` is added to its result, instead of reading ``h``.
        sums_before: Whether it reads ``N(h + x)`` instead of ``h``.
        residual: What is added to its result unless it is parallel: ``body`` ``h``, ``sum`` ``h + x``, ``read`` what it reads.
        norm_before: Whether it has a layer norm of what it reads.
        norm_after: Whether it has a layer norm of its result.
        residual_before_norm: Whether the residual is added before that norm.
        gated: Whether its result is multiplied by the mean over all positions of a sigmoid of what it reads.
        finishes: Whether the branch's own sum and norm follow.
    """

    activation: Activation
    parallel: bool = False
    sums_before: bool = False
    residual: Literal["body", "sum", "read"] = "body"
    norm_before: bool = False
    norm_after: bool = False
    residual_before_norm: bool = False
    gated: bool = False
    finishes: bool = True


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """A small network that an adapter inserts behind the body of a branch (arXiv:1902.00751, 2005.00247, 2110.04366).

    ``x`` is the branch's input, ``h`` the body's result or that of the bottleneck before this one, and ``N`` the norm of the
    branch's sum, the identity where it has none. The network is ``up(act(down(.)))``.

    Attributes:
        module: What the names of its tensors begin with; they are stored ``(inputs, outputs)``.
        width: ``D``.
        rank: Inner values; 0 if an optional input decides.
        form: How it computes.
    """

    module: str
    width: int
    rank: int
    form: BottleneckForm

    @property
    def down(self) -> Projection:
        """``D`` to `rank`."""
        return _inner(f"{self.module}.down", self.width, self.rank)

    @property
    def up(self) -> Projection:
        """`rank` to ``D``, the adapter's scale folded in."""
        return _inner(f"{self.module}.up", self.rank, self.width)

    @property
    def gate(self) -> Projection | None:
        """``D`` to one value."""
        return _inner(f"{self.module}.gate", self.width, 1) if self.form.gated else None

    @property
    def before(self) -> Norm | None:
        """Norm of what it reads."""
        return _inner_norm(f"{self.module}.before") if self.form.norm_before else None

    @property
    def after(self) -> Norm | None:
        """Norm of its result."""
        return _inner_norm(f"{self.module}.after") if self.form.norm_after else None


@dataclass(frozen=True, slots=True)
class Coupling:
    """An invertible network behind the embeddings (NICE, arXiv:1410.8516; MAD-X, arXiv:2005.00052).

    Of the halves ``x1`` and ``x2`` it makes ``y1 = x1 + F(x2)`` and ``y2 = x2 + G(y1)``; F and G are ``up(act(down(.)))``.

    Attributes:
        module: What the names of its tensors begin with.
        width: ``D``; the first half has ``D // 2`` values.
        ranks: Inner values of F and G; 0 if an optional input decides.
        activation: Of the inner values.
    """

    module: str
    width: int
    ranks: tuple[int, int]
    activation: Activation

    @property
    def first(self) -> tuple[Projection, Projection]:
        """Down and up of F."""
        return self._pair("F", self.width - self.width // 2, self.width // 2, self.ranks[0])

    @property
    def second(self) -> tuple[Projection, Projection]:
        """Down and up of G."""
        return self._pair("G", self.width // 2, self.width - self.width // 2, self.ranks[1])

    def _pair(self, name: str, inputs: int, outputs: int, rank: int) -> tuple[Projection, Projection]:
        at = f"{self.module}.{name}"
        return _inner(f"{at}.down", inputs, rank), _inner(f"{at}.up", rank, outputs)


def _inner(module: str, inputs: int, outputs: int) -> Projection:
    return Projection(f"{module}.weight", inputs, outputs, f"{module}.bias", transposed=True)


def _inner_norm(module: str) -> Norm:
    return Norm("layer", f"{module}.weight", 1e-5, f"{module}.bias")


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
        projection: Projection of the rows (OPT-350m), or None.
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
