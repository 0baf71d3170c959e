# SPDX-License-Identifier: Apache-2.0
"""Attention of a recipe, and what its scores know of positions.

Shapes as in `surgery_formats.models.families.recipe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from surgery_formats.models.families.recipe_parts import Norm, Projection, Shapes, norm_shapes, projection_shapes

__all__ = ["Alibi", "Attention", "Disentangled", "Latent", "PositionScale", "RelativeBias", "Rope", "ShortConvolution"]


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
        axes: Of each pair, whether its angle follows a token's place in time (0), height (1) or width (2), where images are
            laid out on a grid (Qwen2-VL, arXiv:2409.12191); empty where there is one position.
    """

    dims: int
    parameters: Mapping[str, Any]
    max_positions: int
    interleaved: bool = False
    axes: tuple[int, ...] = ()


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

    def shapes(self) -> Shapes:
        """Its tensors."""
        shapes = projection_shapes(self.key_value, self.query) | norm_shapes(self.key_value.inputs, self.norm)
        return shapes | norm_shapes(self.query.inputs if self.query else 0, self.query_norm)


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
class Disentangled:
    """Scores of contents with embeddings of distances (DeBERTa, arXiv:2006.03654), added before all are scaled.

    A key that lies ``d`` before its query has row ``span + d`` of the table; distances beyond the table have its first or
    last row. With buckets, ``d`` is exact up to half of them, and the others grow logarithmically up to `max_distance`.

    Attributes:
        table: Tensor ``(2 span, D)``.
        span: Half of its rows.
        norm: Norm of the rows, or None.
        buckets: Buckets of each direction, as many as `span`; 0 for one row per distance.
        max_distance: Where buckets end.
        keys: Projection of the rows that queries are compared with (content to position), or None.
        queries: Projection of the rows that keys are compared with (position to content), or None.
    """

    table: str
    span: int
    norm: Norm | None = None
    buckets: int = 0
    max_distance: int = 0
    keys: Projection | None = None
    queries: Projection | None = None

    def shapes(self, hidden: int) -> Shapes:
        """Its tensors, in a model of `hidden` values."""
        table: Shapes = {self.table: (2 * self.span, hidden)}
        return table | norm_shapes(hidden, self.norm) | projection_shapes(self.keys, self.queries)


@dataclass(frozen=True, slots=True)
class ShortConvolution:
    """A convolution over the last tokens, each channel by itself, in the place of attention (LFM2, arXiv:2511.23404).

    The layer's one input is a map to ``[b | c | x]``, and ``c * convolution(b * x)`` goes through its output.

    Attributes:
        weight: Tensor ``(D, 1, kernel)``; its last column is for the token itself.
        kernel: Number of tokens.
    """

    weight: str
    kernel: int


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention ``softmax(scale q k^T + mask) v`` (arXiv:2305.13245), causal in decoders.

    Attributes:
        inputs: q, k and v, or one projection for all three.
        layout: How one projection's output is laid out: ``separate`` for three; ``concatenated`` ``[q | k | v]``;
            ``by_head`` ``[head 0: q k v | head 1: q k v ...]`` (GPT-NeoX); ``by_group`` ``[group 0: q q ... k v | group 1
            ...]``, a group being the query heads of one key head (Falcon); ``latent``, see `latent`.
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
        sinks: Tensor ``(heads,)``: the score of one more key, which has no value, per head (GPT-OSS); or empty.
        latent: How queries, keys and values are made, or None.
        bias: Relative positions (T5, MPNet), or None.
        disentangled: Scores with embeddings of distances (DeBERTa), or None.
        convolution: What takes the place of attention, or None; heads and values per head are then those of other layers.
        q_bias: Tensor ``(heads * head_dim,)``, a bias of queries beside the projections (DeBERTa 1), or empty.
        v_bias: The same of values.
        alibi: Linear bias on the scores, or None.
        query_scale: Factor on queries by their position, or None.
        clip: Bound on the absolute values of projected queries, keys and values, or None.
        v_norm: Norm of each head's values (Gemma 3n), or None.
        shared: Number of the earlier layer whose keys and values it takes, or None; `inputs` are then the queries alone.
    """

    inputs: tuple[Projection, ...]
    output: Projection
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    layout: Literal["separate", "concatenated", "by_head", "by_group", "latent"] = "separate"
    rope: Rope | None = None
    window: int | None = None
    softcap: float | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_over: Literal["head", "heads", "width"] = "head"
    norm_after_rope: bool = False
    sinks: str = ""
    latent: Latent | None = None
    bias: RelativeBias | None = None
    disentangled: Disentangled | None = None
    convolution: ShortConvolution | None = None
    q_bias: str = ""
    v_bias: str = ""
    alibi: Alibi | None = None
    query_scale: PositionScale | None = None
    clip: float | None = None
    v_norm: Norm | None = None
    shared: int | None = None

    def shapes(self, hidden: int) -> Shapes:
        """Its tensors, in a model of `hidden` values."""
        shapes = projection_shapes(*self.inputs, self.output)
        if self.bias is not None:
            shapes[self.bias.table] = self.bias.buckets, self.heads
        shapes |= {name: (self.heads * self.head_dim,) for name in (self.q_bias, self.v_bias) if name}
        if self.disentangled is not None:
            shapes |= self.disentangled.shapes(hidden)
        if self.convolution is not None:
            shapes[self.convolution.weight] = self.output.inputs, 1, self.convolution.kernel
        if self.sinks:
            shapes[self.sinks] = (self.heads,)
        if self.latent is not None:
            shapes |= self.latent.shapes()
        return shapes | self._gains(self.q_norm, self.heads) | self._gains(self.k_norm, self.kv_heads)

    def _gains(self, norm: Norm | None, heads: int) -> Shapes:
        """Those of a norm of so many heads."""
        if norm is None or self.norm_over != "heads":
            return norm_shapes(self.head_dim * (heads if self.norm_over == "width" else 1), norm)
        if "{h}" not in norm.weight:
            return {name: (heads, self.head_dim) for name in (norm.weight, norm.bias) if name}
        own = (replace(norm, weight=norm.weight.format(h=h), bias=norm.bias.format(h=h)) for h in range(heads))
        return norm_shapes(self.head_dim, *own)
