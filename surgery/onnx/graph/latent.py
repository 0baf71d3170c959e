# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values of multi-head latent attention, for operators whose heads all have one size.

Values are padded with zeros to the size of a key, and the zeros cut off the result, so that the cache, GroupQueryAttention and the
runner are those of every other model. The cache holds keys and values as the heads read them, not the latent vectors.
"""

from __future__ import annotations

from typing import Any

from surgery.onnx.graph.context import Context
from surgery.onnx.graph.frame import Frame
from surgery.onnx.graph.linear import joined, linear
from surgery.onnx.graph.norm import norm
from surgery_formats.models.families.recipe import Attention, Latent

__all__ = ["latent_parts", "without_padding"]


def latent_parts(
    ctx: Context, record: Attention, latent: Latent, x: str, frame: Frame, at: str
) -> tuple[str, str, str]:
    """Queries, keys and padded values, rotated, ``(B, S, heads * head_dim)`` each."""
    graph, heads, size = ctx.graph, record.heads, record.head_dim
    turned = size - latent.plain
    first, last = record.inputs
    both = joined(ctx, record.inputs, x)
    if both is not None:
        q, compressed = graph.several("Split", [both, graph.ints(first.outputs, last.outputs)], at, ("*", "*"), axis=-1)
    else:
        q, compressed = linear(ctx, first, x), linear(ctx, last, x)
    if latent.query is not None:
        if latent.query_norm is not None:
            q = norm(ctx, latent.query_norm, q, latent.query.inputs, at)
        q = linear(ctx, latent.query, q)
    rank = latent.key_value.inputs
    c, r = graph.several("Split", [compressed, graph.ints(rank, turned)], at, ("*", "*"), axis=-1)
    expanded = linear(ctx, latent.key_value, norm(ctx, latent.norm, c, rank, at))
    k, v = _heads(ctx, expanded, heads, (latent.plain, latent.values), at)
    plain, rotated = _heads(ctx, q, heads, (latent.plain, turned), at)
    q = graph.node("Concat", [plain, _rotated(ctx, record, rotated, heads, frame, at)], at, axis=-1)
    shared = _rotated(ctx, record, r, 1, frame, at)
    k = graph.node("Concat", [k, graph.node("Expand", [shared, graph.ints(1, heads, 1)], at)], at, axis=-1)
    if latent.values < size:
        v = graph.node("Pad", [v, graph.ints(0, 0, 0, 0, 0, size - latent.values)], at)
    q, k, v = (ctx.batched(part, at) for part in (q, k, v))
    return q, k, v


def _heads(ctx: Context, x: str, heads: int, sizes: tuple[int, int], at: str) -> list[str]:
    """The two parts of every head, ``(B*S, heads, size)``."""
    each = ctx.reshaped(x, (-1, heads, sum(sizes)), at)
    return ctx.graph.several("Split", [each, ctx.graph.ints(*sizes)], at, ("*", "*"), axis=-1)


def _rotated(ctx: Context, record: Attention, x: str, heads: int, frame: Frame, at: str) -> str:
    """The values that are rotated, ``(B*S, heads, dims)``."""
    assert record.rope is not None
    rows = frame.table(record.rope)
    options: dict[str, Any] = {"interleaved": 1} if record.rope.interleaved else {}
    inputs = [ctx.batched(x, at), rows.cos, rows.sin, frame.shifted_positions(rows)]
    y = ctx.graph.node("RotaryEmbedding", inputs, at, num_heads=heads, **options)
    return ctx.reshaped(y, (-1, heads, record.rope.dims), at)


def without_padding(ctx: Context, record: Attention, latent: Latent, y: str, at: str) -> str:
    """The result of attention to padded values without the padding, in the rank of the hidden states."""
    if latent.values < record.head_dim:
        y = ctx.reshaped(y, (-1, record.heads, record.head_dim), at)
        y = ctx.graph.node("Slice", [y, *(ctx.graph.ints(number) for number in (0, latent.values, -1))], at)
    rows = ctx.reshaped(y, (-1, record.output.inputs), at)
    return rows if ctx.flat else ctx.batched(rows, at)
