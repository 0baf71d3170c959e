# SPDX-License-Identifier: Apache-2.0
"""The transformation of each token by itself: two maps with an activation between them."""

from __future__ import annotations

from statistics import NormalDist

from surgery.onnx.graph.activation import activate, gated_silu, xielu
from surgery.onnx.graph.context import Context, module_of
from surgery.onnx.graph.graph import END
from surgery.onnx.graph.linear import joined, linear
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import MLP

__all__ = ["mlp"]


def mlp(ctx: Context, record: MLP, x: str, *, alpha: float = 1.0) -> str:
    """``alpha down(act(gate x) * up x)``, or without a gate ``alpha down(act(up x))``."""
    at = module_of(module_of(record.output.weight))
    if record.activation == "xielu":
        return linear(ctx, record.output, xielu(ctx, record.shape, linear(ctx, record.inputs[0], x)), alpha=alpha)
    if not record.gated:
        inner = activate(ctx, record.activation, linear(ctx, record.inputs[0], x), at)
        return linear(ctx, record.output, inner, alpha=alpha)
    if len(record.inputs) == 1:
        gate_up: str | None = linear(ctx, record.inputs[0], x)
    else:
        slotted = ctx.packed and any(part.weight in ctx.slotted for part in record.inputs)
        gate_up = joined(ctx, record.inputs, x) if ctx.target.packed == "all" or slotted else None
    if gate_up is not None and record.interleaved:
        gate, up = (_every_second(ctx, gate_up, first, at) for first in (0, 1))
    elif gate_up is not None:
        gate, up = ctx.graph.several("Split", [gate_up], at, ("*", "*"), axis=-1, num_outputs=2)
        gate, up = (up, gate) if record.gate_last else (gate, up)
    else:
        gate, up = (linear(ctx, projection, x) for projection in record.inputs)
    if record.limit is not None:
        low, high = (ctx.graph.number(bound, ctx.io) for bound in (-record.limit, record.limit))
        gate, up = ctx.graph.node("Clip", [gate, "", high], at), ctx.graph.node("Clip", [up, low, high], at)
    if record.sparsity:
        gate = _cut_off(ctx, gate, record.sparsity, at)
    if record.up_plus:
        up = ctx.graph.node("Add", [up, ctx.graph.number(record.up_plus, ctx.io)], at)
    fused = record.activation == "silu" and ctx.target.gate == "fused"
    product = gated_silu(ctx, gate, up, record.output.inputs, at) if fused else None
    product = product or ctx.graph.node("Mul", [activate(ctx, record.activation, gate, at), up], at)
    return linear(ctx, record.output, product, alpha=alpha)


def _cut_off(ctx: Context, gate: str, share: float, at: str) -> str:
    """What each token's gate has above mean + q deviations, ``share`` of normally distributed values being below; else 0."""
    graph = ctx.graph
    wide = gate if ctx.io is DType.F32 else graph.cast(gate, DType.F32, at)  # squares of float16 overflow
    centred = graph.node("Sub", [wide, graph.node("ReduceMean", [wide, graph.ints(-1)], at)], at)
    squares = graph.node("Mul", [centred, centred], at)
    deviation = graph.node("Sqrt", [graph.node("ReduceMean", [squares, graph.ints(-1)], at)], at)
    bound = graph.node("Mul", [deviation, graph.number(NormalDist().inv_cdf(share), DType.F32)], at)
    above = graph.node("Relu", [graph.node("Sub", [centred, bound], at)], at)
    return above if ctx.io is DType.F32 else graph.cast(above, ctx.io, at)


def _every_second(ctx: Context, x: str, first: int, at: str) -> str:
    """The values ``first, first + 2, ...`` of the last axis."""
    bounds = [ctx.graph.ints(number) for number in (first, END, -1, 2)]
    return ctx.graph.node("Slice", [x, *bounds], at)
