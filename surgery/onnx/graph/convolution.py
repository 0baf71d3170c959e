# SPDX-License-Identifier: Apache-2.0
"""The convolution behind an encoder's first layer (DeBERTa)."""

from __future__ import annotations

from surgery.onnx.graph.activation import activate
from surgery.onnx.graph.context import Context, ResidualStream, module_of
from surgery.onnx.graph.norm import residual_norm
from surgery_formats.models.families.recipe import Convolution

__all__ = ["convolved"]


def convolved(ctx: Context, record: Convolution, first: str, result: str, width: int) -> str:
    """``N(result + act(conv(first)))``, padding of `first` being zero."""
    graph, at = ctx.graph, module_of(record.weight)
    real = graph.cast(graph.node("Unsqueeze", [ctx.real(), graph.ints(2)], at), ctx.io, at)
    x = graph.node("Mul", [ctx.batched(first, at) if ctx.flat else first, real], at)
    weight = ctx.weights.value(record.weight, (width, width // record.groups, record.width))
    bias = ctx.weights.value(record.bias, (width,))
    pads = [record.width // 2] * 2
    y = graph.node(
        "Conv", [graph.node("Transpose", [x], at, perm=[0, 2, 1]), weight, bias], at, pads=pads, group=record.groups
    )
    y = graph.node("Transpose", [y], at, perm=[0, 2, 1])
    y = activate(ctx, record.activation, ctx.reshaped(y, (-1, width), at) if ctx.flat else y, at)
    stream = ResidualStream(result, y)
    return residual_norm(ctx, record.norm, stream, width, module_of(record.norm.weight), keep=False)[0]
