# SPDX-License-Identifier: Apache-2.0
"""Attention of a decoder layer, as GroupQueryAttention or the standard operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from surgery.onnx.graph.context import CacheValues, Context, module_of
from surgery.onnx.graph.frame import Frame
from surgery.onnx.graph.graph import MICROSOFT
from surgery.onnx.graph.latent import latent_parts, without_padding
from surgery.onnx.graph.linear import joined, linear
from surgery.onnx.graph.norm import gain, norm
from surgery.onnx.graph.rotary import RotaryTable
from surgery.onnx.graph.short_convolution import short_convolution
from surgery.onnx.graph.sinks import attention_with_sinks
from surgery_formats.models.families.recipe import Attention, Norm, Rope

__all__ = ["RotaryValues", "cached_attention", "normed", "project", "rotated", "split"]

_ROTATED = 16  # GroupQueryAttention can rotate only a multiple of this many values


class RotaryValues(Protocol):
    """The values of a graph that rotate queries and keys."""

    def table(self, rope: Rope) -> RotaryTable:
        """Cosines and sines."""
        ...

    def shifted_positions(self, rows: RotaryTable) -> str:
        """Row indices into the table, of every new token."""
        ...


def cached_attention(
    ctx: Context, record: Attention, x: str, frame: Frame, cache: CacheValues | None, *, layer: int, alpha: float = 1.0
) -> str:
    """Attention of new tokens to past and new ones, times `alpha`; without a `cache` there are no past ones.

    `layer` is the number of the layer, by which others find its keys and values.
    """
    if record.convolution is not None:
        return short_convolution(ctx, record, record.convolution, x, frame, cache, alpha)
    at = module_of(module_of(record.output.weight))
    if cache is not None and ctx.target.attention == "gqa":
        y = _grouped(ctx, record, x, frame, cache, at)
    else:
        y = _standard(ctx, record, x, frame, cache, layer, at)
    if record.latent is not None:
        y = without_padding(ctx, record, record.latent, y, at)
    elif ctx.flat:
        y = ctx.reshaped(y, (-1, record.output.inputs), at)
    return linear(ctx, record.output, y, alpha=alpha)


def project(ctx: Context, record: Attention, x: str, at: str) -> tuple[str, ...]:
    """Queries, keys and values as one value side by side, or as three; in the rank of the hidden states."""
    if record.layout == "separate":
        also = record.disentangled  # projections that distances take too keep slots of their own
        alone = also is not None and not {also.keys, also.queries}.isdisjoint(record.inputs)
        packed = None if alone else joined(ctx, record.inputs, x)
        values = (packed,) if packed else tuple(linear(ctx, projection, x) for projection in record.inputs)
        return tuple(_clipped(ctx, record, value, at) for value in values)
    value = _clipped(ctx, record, linear(ctx, record.inputs[0], x), at)
    if record.layout == "by_group":
        return _ungrouped(ctx, record, value, at)
    if record.layout == "by_head":  # head by head q, k, v -> all q, all k, all v
        rows = (-1,) if ctx.flat else (0, 0)  # the last size stays explicit: shape inference would get it wrong
        last = len(rows)
        heads = ctx.reshaped(value, (*rows, record.heads, 3, record.head_dim), at)
        turned = ctx.graph.node("Transpose", [heads], at, perm=[*range(last), last + 1, last, last + 2])
        value = ctx.reshaped(turned, (*rows, 3 * record.heads * record.head_dim), at)
    return (value,)


def _clipped(ctx: Context, record: Attention, value: str, at: str) -> str:
    if record.clip is None:
        return value
    return ctx.graph.node("Clip", [value, *(ctx.graph.number(sign * record.clip, ctx.io) for sign in (-1, 1))], at)


def _ungrouped(ctx: Context, record: Attention, value: str, at: str) -> tuple[str, ...]:
    """Group by group its queries, its key and its value -> all q, all k, all v."""
    rows = (-1,) if ctx.flat else (0, 0)
    group = record.heads // record.kv_heads
    groups = ctx.reshaped(value, (*rows, record.kv_heads, group + 2, record.head_dim), at)
    parts = ctx.graph.several("Split", [groups, ctx.graph.ints(group, 1, 1)], at, ("*", "*", "*"), axis=-2)
    counts = (record.heads, record.kv_heads, record.kv_heads)
    return tuple(
        ctx.reshaped(part, (*rows, count * record.head_dim), at) for part, count in zip(parts, counts, strict=True)
    )


def split(ctx: Context, record: Attention, parts: tuple[str, ...], at: str) -> tuple[str, str, str]:
    """Split the result of `project` into queries, keys and values."""
    if len(parts) == 3:
        return parts[0], parts[1], parts[2]
    keys = record.kv_heads * record.head_dim
    sizes = ctx.graph.ints(record.heads * record.head_dim, keys, keys)
    q, k, v = ctx.graph.several("Split", [parts[0], sizes], at, ("*", "*", "*"), axis=-1)
    return q, k, v


def _grouped(ctx: Context, record: Attention, x: str, frame: Frame, cache: CacheValues, at: str) -> str:
    if record.latent is not None:
        parts: tuple[str, ...] = latent_parts(ctx, record, record.latent, x, frame, at)
        return _group_query(ctx, record, parts, frame, cache, at)
    parts = project(ctx, record, x, at)
    rows = frame.table(record.rope) if record.rope else None
    fused = rows is not None and record.rope is not None and record.rope.dims % _ROTATED == 0 and not rows.original
    fused = fused and not record.norm_after_rope and not frame.places  # not every operator takes positions
    norms = ["", ""]
    options: dict[str, Any] = {}
    if not record.norm_after_rope and (record.q_norm or record.k_norm):
        if _norms_inside(ctx, record) and (fused or record.rope is None):
            norms = [_fused_gain(ctx, head_norm, record.head_dim) for head_norm in (record.q_norm, record.k_norm)]
            assert record.q_norm is not None
            options = {"qk_norm_epsilon": record.q_norm.epsilon}
        else:
            parts = normed(ctx, record, split(ctx, record, parts, at), at)
    if record.query_scale is not None:
        parts = _position_scaled(ctx, record, split(ctx, record, parts, at), frame, at)
    if rows is not None and not fused:
        parts = rotated(ctx, record, split(ctx, record, parts, at), frame, at)
    elif ctx.flat:
        parts = tuple(ctx.batched(part, at) for part in parts)
    if not fused or rows is None or record.rope is None:
        return _group_query(ctx, record, parts, frame, cache, at, norms=norms, **options)
    options["do_rotary"] = 1
    if record.rope.interleaved:
        options["rotary_interleaved"] = 1
    return _group_query(ctx, record, parts, frame, cache, at, [rows.cos, rows.sin], norms, **options)


def _group_query(
    ctx: Context,
    record: Attention,
    parts: tuple[str, ...],
    frame: Frame,
    cache: CacheValues,
    at: str,
    tables: Sequence[str] = ("", ""),
    norms: Sequence[str] = ("", ""),
    **options: Any,
) -> str:
    options = {"scale": float(record.scale), **options}
    if record.window is not None:
        options["local_window_size"] = record.window
    if record.softcap is not None:
        options["softcap"] = float(record.softcap)
    query, key, value = parts if len(parts) == 3 else (parts[0], "", "")
    query = frame.guarded(query, at)
    past = [cache.past_key, cache.past_value]
    sinks = ctx.weights.value(record.sinks, (record.heads,)) if record.sinks else ""
    inputs = [query, key, value, *past, *frame.lengths, *tables, "", "", sinks, "", "", *norms]
    return ctx.graph.several(
        "GroupQueryAttention",
        inputs,
        at,
        ("*", cache.present_key, cache.present_value),
        domain=MICROSOFT,
        num_heads=record.heads,
        kv_num_heads=record.kv_heads,
        **options,
    )[0]


def _norms_inside(ctx: Context, record: Attention) -> bool:
    """Whether the operator supports these norms: RMS of every head, one gain for all heads, one epsilon."""
    q, k = record.q_norm, record.k_norm
    if record.v_norm is not None:
        return False
    if ctx.target.qk_norm != "fused" or q is None or k is None or record.norm_over != "head" or record.query_scale:
        return False
    return q.kind == k.kind == "rms" and q.epsilon == k.epsilon and bool(q.weight and k.weight)


def _fused_gain(ctx: Context, record: Norm | None, width: int) -> str:
    assert record is not None
    return gain(ctx, record, width)


def _standard(
    ctx: Context, record: Attention, x: str, frame: Frame, cache: CacheValues | None, layer: int, at: str
) -> str:
    if record.shared is not None:
        q, k, v = _queries(ctx, record, x, frame, at), *frame.keys_of[record.shared]
    else:
        q, k, v = _parts(ctx, record, x, frame, at)
        frame.keys_of[layer] = k, v
    if record.sinks:
        return attention_with_sinks(ctx, record, (q, k, v), frame, cache, at)
    options: dict[str, Any] = {} if record.softcap is None else {"softcap": float(record.softcap)}
    past = [cache.past_key, cache.past_value] if cache else []
    # onnxruntime 1.31 gives out keys and values wherever there are earlier ones, although nobody needs those of another layer
    present = [cache.present_key or "*", cache.present_value or "*"] if cache else []
    return ctx.graph.several(
        "Attention",
        [q, k, v, frame.visible(record.window, record.alibi), *past],
        at,
        ("*", *present),
        q_num_heads=record.heads,
        kv_num_heads=record.kv_heads,
        scale=float(record.scale),
        **options,
    )[0]


def _parts(ctx: Context, record: Attention, x: str, frame: Frame, at: str) -> tuple[str, str, str]:
    """Queries, keys and values, normed and rotated, ``(B, S, ...)``."""
    if record.latent is not None:
        return latent_parts(ctx, record, record.latent, x, frame, at)
    parts = split(ctx, record, project(ctx, record, x, at), at)
    if not record.norm_after_rope and (record.q_norm or record.k_norm):
        parts = normed(ctx, record, parts, at)
    if record.query_scale is not None:
        parts = _position_scaled(ctx, record, parts, frame, at)
    if record.rope is not None:
        return rotated(ctx, record, parts, frame, at)
    q, k, v = (ctx.batched(part, at) if ctx.flat else part for part in parts)
    return q, k, v


def _queries(ctx: Context, record: Attention, x: str, frame: Frame, at: str) -> str:
    """Queries alone, normed and rotated, ``(B, S, ...)``."""
    q = linear(ctx, record.inputs[0], x)
    if record.q_norm is not None:
        q = _head_norm(ctx, record, record.q_norm, q, record.heads, at)
    q = ctx.batched(q, at) if ctx.flat else q
    if record.rope is None:
        return q
    rows = frame.table(record.rope)
    inputs = [q, rows.cos, rows.sin, frame.shifted_positions(rows)]
    partial: dict[str, Any] = {} if record.rope.dims == record.head_dim else {"rotary_embedding_dim": record.rope.dims}
    return ctx.graph.node("RotaryEmbedding", inputs, at, num_heads=record.heads, **partial)


def rotated(
    ctx: Context, record: Attention, parts: tuple[str, str, str], frame: RotaryValues, at: str
) -> tuple[str, str, str]:
    """Rotate queries and keys; all three results are ``(B, S, ...)``."""
    assert record.rope is not None
    rows = frame.table(record.rope)
    q, k, v = (ctx.batched(part, at) if ctx.flat else part for part in parts)
    on_grid = isinstance(frame, Frame) and ctx.images == "grid" and bool(record.rope.axes)
    partial: dict[str, Any] = {} if record.rope.dims == record.head_dim else {"rotary_embedding_dim": record.rope.dims}
    if record.rope.interleaved:
        partial["interleaved"] = 1
    if on_grid and isinstance(frame, Frame):
        inputs = [*frame.grid_angles(record.rope)]
    else:
        inputs = [rows.cos, rows.sin, frame.shifted_positions(rows)]
    q = ctx.graph.node("RotaryEmbedding", [q, *inputs], at, num_heads=record.heads, **partial)
    k = ctx.graph.node("RotaryEmbedding", [k, *inputs], at, num_heads=record.kv_heads, **partial)
    if record.norm_after_rope:
        q, k, v = normed(ctx, record, (q, k, v), at)
        q, k = (ctx.batched(part, at) if ctx.flat else part for part in (q, k))
    return q, k, v


def _position_scaled(
    ctx: Context, record: Attention, parts: tuple[str, str, str], frame: Frame, at: str
) -> tuple[str, str, str]:
    assert record.query_scale is not None
    factor = frame.query_factor(record.query_scale)
    shape = (-1, 1) if ctx.flat else (0, 0, 1)
    return ctx.graph.node("Mul", [parts[0], ctx.reshaped(factor, shape, at)], at), parts[1], parts[2]


def normed(ctx: Context, record: Attention, parts: tuple[str, str, str], at: str) -> tuple[str, str, str]:
    """Normalise queries, keys and values, where the family does."""
    q, k, v = parts
    if record.q_norm is not None:
        q = _head_norm(ctx, record, record.q_norm, q, record.heads, at)
    if record.k_norm is not None:
        k = _head_norm(ctx, record, record.k_norm, k, record.kv_heads, at)
    if record.v_norm is not None:
        rows = (-1,) if ctx.flat else (0, 0)  # the last size stays explicit: shape inference would get it wrong
        heads = ctx.reshaped(v, (*rows, record.kv_heads, record.head_dim), at)
        heads = norm(ctx, record.v_norm, heads, record.head_dim, at)
        v = ctx.reshaped(heads, (*rows, record.kv_heads * record.head_dim), at)
    return q, k, v


def _head_norm(ctx: Context, record: Attention, head_norm: Norm, x: str, heads: int, at: str) -> str:
    """Normalise queries or keys, over all heads at once or over each."""
    width = heads * record.head_dim
    if record.norm_over == "width":
        return norm(ctx, head_norm, x, width, at)
    if record.norm_over == "head":
        y = norm(ctx, head_norm, ctx.reshaped(x, (-1, record.head_dim), at), record.head_dim, at)
    else:
        y = norm(
            ctx, replace(head_norm, weight=""), ctx.reshaped(x, (-1, heads, record.head_dim), at), record.head_dim, at
        )
        if "{h}" not in head_norm.weight:
            table = ctx.weights.value(head_norm.weight, (heads, record.head_dim))
            y = ctx.graph.node("Mul", [y, table], at)
        else:
            y = _own_gains(ctx, record, head_norm, y, heads, at)
    flat = ctx.reshaped(y, (-1, width), at)
    return flat if ctx.flat else ctx.batched(flat, at)


def _own_gains(ctx: Context, record: Attention, head_norm: Norm, y: str, heads: int, at: str) -> str:
    gains = [ctx.weights.value(head_norm.weight.replace("{h}", str(h)), (record.head_dim,)) for h in range(heads)]
    rows = [ctx.graph.node("Unsqueeze", [gain, ctx.graph.ints(0)], at) for gain in gains]
    return ctx.graph.node("Mul", [y, ctx.graph.node("Concat", rows, at, axis=0)], at)
