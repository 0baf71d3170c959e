# SPDX-License-Identifier: Apache-2.0
"""Norms, fused with the preceding residual sum if the target supports it."""

from __future__ import annotations

from surgery.onnx.graph.context import Context, ResidualStream, module_of
from surgery.onnx.graph.graph import MICROSOFT
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import Norm

__all__ = ["gain", "norm", "residual_norm"]


def norm(ctx: Context, record: Norm, x: str, width: int, at: str) -> str:
    """Normalise ``x`` over its last axis of `width` values."""
    scale = gain(ctx, record, width)
    if record.kind == "layer":
        return ctx.graph.node(
            "LayerNormalization", [x, scale, _bias(ctx, record, width)], at, axis=-1, epsilon=record.epsilon
        )
    # onnxruntime's own name of the operator needs no opset 23
    op = "SimplifiedLayerNormalization" if ctx.target.norm == "fused" else "RMSNormalization"
    return ctx.graph.node(op, [x, scale], at, axis=-1, epsilon=record.epsilon, stash_type=1)


def residual_norm(
    ctx: Context, record: Norm, stream: ResidualStream, width: int, at: str, *, keep: bool = True
) -> tuple[str, ResidualStream]:
    """Normalise the stream's sum; also returns the stream for its next reader, if there is one (`keep`)."""
    if ctx.target.norm == "standard" or not stream.pending:
        summed = ctx.total(stream, at)
        return norm(ctx, record, summed, width, at), ResidualStream(summed)
    inputs = [stream.value, stream.pending, gain(ctx, record, width)]
    op = "SkipSimplifiedLayerNormalization"
    if record.kind == "layer":
        op = "SkipLayerNormalization"
        inputs.append(_bias(ctx, record, width))
    outputs = ("*", "", "", "*") if keep else ("*",)
    values = ctx.graph.several(op, inputs, at, outputs, domain=MICROSOFT, epsilon=record.epsilon)
    return values[0], ResidualStream(values[-1])


def gain(ctx: Context, record: Norm, width: int) -> str:
    """The gain as a vector of the graph's type."""
    if not record.weight:
        return ctx.graph.ones(width, ctx.io)
    if not record.plus_one:
        return ctx.weights.value(record.weight, (width,))
    at = module_of(record.weight)  # 1 + g is rounded once, after the sum; runtimes fold it
    total = ctx.graph.node("Add", [ctx.weights.exact(record.weight, (width,)), ctx.graph.number(1.0, DType.F32)], at)
    return total if ctx.io is DType.F32 else ctx.graph.cast(total, ctx.io, at)


def _bias(ctx: Context, record: Norm, width: int) -> str:
    return ctx.weights.value(record.bias, (width,)) if record.bias else ""
