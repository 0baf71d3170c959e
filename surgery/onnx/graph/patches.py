# SPDX-License-Identifier: Apache-2.0
"""From an image to the first hidden states, a token for each patch, and from tokens back to a mean."""

from __future__ import annotations

from surgery.onnx.graph.context import Context, ResidualStream, module_of
from surgery.onnx.graph.dims import BATCH
from surgery.onnx.graph.graph import END
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import Model, Patches

__all__ = ["looked_at", "mean_of_patches"]


def looked_at(ctx: Context, model: Model, patches: Patches) -> ResidualStream:
    """Cut up the input ``pixel_values (B, channels, height, width)``, of the size of the configuration."""
    graph, width, at = ctx.graph, model.hidden, module_of(patches.weight)
    x = graph.input("pixel_values", ctx.io, (BATCH, patches.channels, *patches.image))
    inputs = [x, ctx.weights.value(patches.weight, (width, patches.channels, *patches.patch))]
    if patches.bias:
        inputs.append(ctx.weights.value(patches.bias, (width,)))
    made = graph.node("Conv", inputs, at, kernel_shape=[*patches.patch], strides=[*patches.patch])
    x = graph.node("Transpose", [ctx.reshaped(made, (0, width, -1), at)], at, perm=[0, 2, 1])
    at = module_of(at)
    places = ctx.weights.value(patches.positions, patches.positions_shape)
    if len(patches.positions_shape) == 2:
        places = ctx.reshaped(places, (1, *patches.positions_shape), at)
    if patches.first:
        own = graph.node("Slice", [places, graph.ints(0), graph.ints(1), graph.ints(1)], at)
        places = graph.node("Slice", [places, graph.ints(1), graph.ints(END), graph.ints(1)], at)
        first = ctx.reshaped(ctx.weights.value(patches.first, patches.first_shape), (1, 1, width), at)
        front = graph.node("Add", [first, own], at)
        if patches.registers:
            registers = ctx.weights.value(patches.registers, (1, patches.register_count, width))
            front = graph.node("Concat", [front, registers], at, axis=1)
        rows = graph.node("Shape", [x], at, start=0, end=1)
        front = graph.node("Expand", [front, graph.node("Concat", [rows, graph.ints(1, 1)], at, axis=0)], at)
        x = graph.node("Concat", [front, graph.node("Add", [x, places], at)], at, axis=1)
    else:
        x = graph.node("Add", [x, places], at)
    ctx.ids = x  # as many rows and places as all later values
    ctx.sequence, ctx.in_front = patches.in_front + patches.count, patches.in_front
    return ResidualStream(ctx.reshaped(x, (-1, width), at) if ctx.flat else x)


def mean_of_patches(ctx: Context, x: str, *, with_first: bool) -> str:
    """The mean of the patches, ``(B, D)``, behind the first token's state if `with_first`."""
    graph, at = ctx.graph, "classifier"
    x = ctx.batched(x, at) if ctx.flat else x
    cut = graph.node("Slice", [x, *(graph.ints(bound) for bound in (ctx.in_front, END, 1))], at)
    mean = graph.node("ReduceMean", [cut, graph.ints(1)], at, keepdims=0)
    if not with_first:
        return mean
    return graph.node("Concat", [graph.node("Gather", [x, graph.number(0, DType.I64)], at, axis=1), mean], at, axis=-1)
