# SPDX-License-Identifier: Apache-2.0
"""A short convolution over the tokens, in the place of attention, with what it still has to see as a state of fixed size."""

from __future__ import annotations

from surgery.onnx.graph.context import CacheValues, Context, module_of
from surgery.onnx.graph.frame import Frame
from surgery.onnx.graph.graph import END
from surgery.onnx.graph.linear import linear
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import Attention, ShortConvolution

__all__ = ["short_convolution", "state_names"]


def state_names(layer: int) -> tuple[str, str]:
    """Input and output of a layer's state, as transformers.js and optimum name them."""
    return f"past_conv.{layer}", f"present_conv.{layer}"


def short_convolution(
    ctx: Context,
    record: Attention,
    own: ShortConvolution,
    x: str,
    frame: Frame,
    cache: CacheValues | None,
    alpha: float,
) -> str:
    """``out(c * convolution(b * x))``, times `alpha`; the state ``(B, D, kernel)`` is what was convolved last.

    Padding counts as zero wherever it is, and the state ends with a row's last token.
    """
    graph, at, width = ctx.graph, module_of(module_of(record.output.weight)), record.output.inputs
    mixed = linear(ctx, record.inputs[0], x)
    mixed = ctx.batched(mixed, at) if ctx.flat else mixed
    b, c, inner = graph.several("Split", [mixed], at, ("*", "*", "*"), axis=-1, num_outputs=3)
    real = graph.node("Unsqueeze", [graph.cast(frame.real, ctx.io, at), graph.ints(2)], at)
    entered = graph.node("Mul", [graph.node("Mul", [b, inner], at), real], at)
    entered = graph.node("Transpose", [entered], at, perm=[0, 2, 1])
    weight = ctx.weights.value(own.weight, (width, 1, own.kernel))
    if cache is None:
        y = graph.node("Conv", [entered, weight], at, group=width, pads=[own.kernel - 1, 0])
    else:
        seen = graph.node("Concat", [cache.past_key, entered], at, axis=2)
        kept = graph.node("GatherElements", [seen, _last(ctx, own, seen, frame, at)], at, axis=2)
        graph.rename(kept, cache.present_key)
        begin, end, axis = (graph.ints(number) for number in (1, END, 2))
        y = graph.node("Conv", [graph.node("Slice", [seen, begin, end, axis], at), weight], at, group=width)
    y = graph.node("Mul", [c, graph.node("Transpose", [y], at, perm=[0, 2, 1])], at)
    return linear(ctx, record.output, ctx.reshaped(y, (-1, width), at) if ctx.flat else y, alpha=alpha)


def _last(ctx: Context, own: ShortConvolution, seen: str, frame: Frame, at: str) -> str:
    """Where the values lie that the state keeps ``(B, D, kernel)``: those up to the last new token of each row."""
    graph = ctx.graph
    steps = graph.node("Range", [graph.number(n, DType.I64) for n in (0, own.kernel, 1)], at)
    indices = graph.node("Add", [frame.last_new, steps], at)
    shape = graph.node("Concat", [graph.node("Shape", [seen], at, start=0, end=2), graph.ints(own.kernel)], at, axis=0)
    return graph.node("Expand", [graph.node("Unsqueeze", [indices, graph.ints(1)], at), shape], at)
