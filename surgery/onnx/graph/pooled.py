# SPDX-License-Identifier: Apache-2.0
"""One vector of an image or a text, beside the last hidden states."""

from __future__ import annotations

from surgery.onnx.graph.context import Context, module_of
from surgery.onnx.graph.graph import END
from surgery.onnx.graph.linear import linear
from surgery.onnx.graph.mlp import mlp
from surgery.onnx.graph.norm import norm
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import PooledHead, Probe

__all__ = ["pooled_head"]


def pooled_head(ctx: Context, record: PooledHead, x: str, width: int) -> None:
    """Add the outputs ``last_hidden_state (B, S, D)`` and the head's own."""
    x = ctx.batched(x, "", out="last_hidden_state") if ctx.flat else ctx.graph.rename(x, "last_hidden_state")
    ctx.graph.output(x, ctx.io, (ctx.batch, ctx.sequence, width))
    y = _one_token(ctx, record, x) if record.probe is None else _asked(ctx, record.probe, x, width)
    if record.norm is not None:
        y = norm(ctx, record.norm, y, width, module_of(record.norm.weight))
    if record.projection is not None:
        y = linear(ctx, record.projection, y)
    size = width if record.projection is None else record.projection.outputs
    ctx.graph.output(ctx.graph.rename(y, record.output), ctx.io, (ctx.batch, size))


def _one_token(ctx: Context, record: PooledHead, x: str) -> str:
    graph, at = ctx.graph, "pooled"
    if record.token in ("first", "last"):
        place = graph.number(0 if record.token == "first" else -1, DType.I64)
        return graph.node("Gather", [x, place], at, axis=1)
    values = ctx.ids
    if record.token == "end":
        values = graph.node("Equal", [values, graph.number(record.end, DType.I64)], at)
    place = graph.node("ArgMax", [graph.cast(values, DType.I32, at)], at, axis=1, keepdims=1)
    return graph.node("GatherND", [x, place], at, batch_dims=1)


def _asked(ctx: Context, probe: Probe, x: str, width: int) -> str:
    """What the learned query makes of all tokens ``(B, S, D)``; its own query is computed beside their keys and values."""
    graph, at = ctx.graph, module_of(probe.query)
    query = ctx.weights.value(probe.query, (1, 1, width))
    rows = graph.node("Shape", [x], at, start=0, end=1)
    query = graph.node("Expand", [query, graph.node("Concat", [rows, graph.ints(1, 1)], at, axis=0)], at)
    together = graph.node("Concat", [query, x], at, axis=1)
    if ctx.flat:
        projected = linear(ctx, probe.inputs, ctx.reshaped(together, (-1, width), at))
        shape = graph.node("Concat", [rows, graph.ints(-1, 3 * width)], at, axis=0)
        projected = graph.node("Reshape", [projected, shape], at)
    else:
        projected = linear(ctx, probe.inputs, together)
    q, k, v = graph.several("Split", [projected, graph.ints(width, width, width)], at, ("*",) * 3, axis=-1)
    q = graph.node("Slice", [q, *(graph.ints(bound) for bound in (0, 1, 1))], at)
    k, v = (graph.node("Slice", [part, *(graph.ints(bound) for bound in (1, END, 1))], at) for part in (k, v))
    y = graph.node(
        "Attention",
        [q, k, v],
        at,
        q_num_heads=probe.heads,
        kv_num_heads=probe.heads,
        scale=float((width // probe.heads) ** -0.5),
    )
    y = linear(ctx, probe.output, ctx.reshaped(y, (-1, width), at))
    return graph.node("Add", [y, mlp(ctx, probe.mlp, norm(ctx, probe.norm, y, width, at))], at)
