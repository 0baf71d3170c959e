# SPDX-License-Identifier: Apache-2.0
"""From a spectrogram to the first hidden states of an encoder of sound."""

from __future__ import annotations

from surgery.onnx.graph.activation import activate
from surgery.onnx.graph.context import Context, ResidualStream, module_of
from surgery.onnx.graph.dims import BATCH
from surgery_formats.models.families.recipe import AudioStem, Model

__all__ = ["heard"]


def heard(ctx: Context, model: Model, stem: AudioStem) -> ResidualStream:
    """Convolve the input ``input_features (B, bins, frames)``, and add positions, one for each frame that is left."""
    graph = ctx.graph
    x = graph.input("input_features", ctx.io, (BATCH, stem.bins, stem.frames))
    for step in stem.convolutions:
        at = module_of(step.weight)
        weight = ctx.weights.value(step.weight, (step.outputs, step.inputs, step.kernel))
        inputs = [x, weight, ctx.weights.value(step.bias, (step.outputs,))]
        made = graph.node("Conv", inputs, at, kernel_shape=[step.kernel], pads=[1, 1], strides=[step.stride])
        x = activate(ctx, "gelu", made, at)
    at = module_of(model.embedding.positions)
    rows = ctx.weights.value(model.embedding.positions, (model.max_positions, model.hidden))
    x = graph.node("Transpose", [x], at, perm=[0, 2, 1])
    x = graph.node("Add", [x, rows], at)
    ctx.ids = x  # as many rows and places as all later values
    return ResidualStream(ctx.reshaped(x, (-1, model.hidden), at) if ctx.flat else x)
