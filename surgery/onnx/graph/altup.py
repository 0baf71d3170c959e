# SPDX-License-Identifier: Apache-2.0
"""Layers over several streams of hidden states, and each layer's own embedding of a token (Gemma 3n).

``n`` streams are one value, ``(B*S, n, D)`` or ``(B, S, n, D)``: its axis -2 is what predictions and corrections mix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from surgery.onnx.graph.activation import activate
from surgery.onnx.graph.context import Context, module_of
from surgery.onnx.graph.embedding import rows_of_table
from surgery.onnx.graph.layers import Body
from surgery.onnx.graph.linear import linear, lora_slot
from surgery.onnx.graph.mlp import mlp
from surgery.onnx.graph.norm import norm
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import (
    MLP,
    AltUp,
    AltUpLayer,
    Branch,
    Laurel,
    Layer,
    LayerEmbeddings,
    Model,
    Norm,
    Projection,
)

__all__ = ["altup_layers"]

_LEAST = 1e-5
"""The least mean square that a stream is divided by."""


def altup_layers(ctx: Context, model: Model, altup: AltUp, x: str, bodies: Sequence[Body]) -> str:
    """All layers, from the first hidden states to those in front of the final norm; `bodies` are their attention."""
    inputs = _layer_inputs(ctx, model, x)
    streams = _begun(ctx, altup, x)
    for layer, attend, own in zip(model.layers, bodies, inputs, strict=True):
        streams = _layer(ctx, model, altup, layer, streams, own, attend)
    return _ended(ctx, altup, streams)


def _scaled_to(ctx: Context, x: str, target: str, at: str) -> str:
    """`x` with the mean square `target` ``(..., 1)``, float32."""
    graph = ctx.graph
    own = graph.node("Max", [_mean_square(ctx, x, at), graph.number(_LEAST, DType.F32)], at)
    factor = graph.node("Sqrt", [graph.node("Div", [target, own], at)], at)
    return graph.node("Mul", [x, factor if ctx.io is DType.F32 else graph.cast(factor, ctx.io, at)], at)


def _mean_square(ctx: Context, x: str, at: str) -> str:
    wide = x if ctx.io is DType.F32 else ctx.graph.cast(x, DType.F32, at)
    return ctx.graph.node("ReduceMean", [ctx.graph.node("Mul", [wide, wide], at), ctx.graph.ints(-1)], at)


def _begun(ctx: Context, altup: AltUp, x: str) -> str:
    at = "streams"
    target = _mean_square(ctx, x, at)
    values = [x, *(_scaled_to(ctx, linear(ctx, one, x), target, module_of(one.weight)) for one in altup.begins)]
    return ctx.graph.node("Concat", [_as_stream(ctx, value, at) for value in values], at, axis=-2)


def _ended(ctx: Context, altup: AltUp, streams: str) -> str:
    at = "streams"
    first = _stream(ctx, streams, 0, at)
    target = _mean_square(ctx, first, at)
    total = first
    for number, one in enumerate(altup.ends, start=1):
        value = linear(ctx, one, _stream(ctx, streams, number, at))
        total = ctx.graph.node("Add", [total, _scaled_to(ctx, value, target, module_of(one.weight))], at)
    return ctx.graph.node("Mul", [total, ctx.graph.number(1 / altup.streams, ctx.io)], at)


def _as_stream(ctx: Context, x: str, at: str) -> str:
    return ctx.graph.node("Unsqueeze", [x, ctx.graph.ints(-2)], at)


def _stream(ctx: Context, streams: str, number: int, at: str) -> str:
    return ctx.graph.node("Gather", [streams, ctx.graph.number(number, DType.I64)], at, axis=-2)


def _layer(ctx: Context, model: Model, altup: AltUp, layer: Layer, streams: str, own: str, attend: Body) -> str:
    record, graph = layer.altup, ctx.graph
    assert record is not None
    assert isinstance(layer.mlp, MLP)
    if layer.attention_branch.inserted or layer.mlp_branch.inserted:
        raise FitError("modules inserted into a model with several streams of hidden states are not supported")
    at = module_of(module_of(record.router.weight))
    predicted = _predicted(ctx, altup, record, streams, model.hidden, at)
    active = _stream(ctx, predicted, altup.active, at)
    x = _normed(ctx, layer.attention_branch, "before", active, model.hidden)
    attended = _normed(ctx, layer.attention_branch, "after", attend(x, 1.0), model.hidden)
    both = graph.node("Add", [attended, _laurel(ctx, record.laurel, x, model.hidden)], at)
    summed = graph.node("Add", [active, both], at)
    y = graph.node("Mul", [summed, graph.number(1 / math.sqrt(2), ctx.io)], at)
    inner = mlp(ctx, layer.mlp, _normed(ctx, layer.mlp_branch, "before", y, model.hidden))
    y = graph.node("Add", [y, _normed(ctx, layer.mlp_branch, "after", inner, model.hidden)], at)
    corrected = _corrected(ctx, record, predicted, active, y, model.hidden, at)
    first = _stream(ctx, corrected, altup.active, at)
    if record.gains:
        first = graph.node("Mul", [first, ctx.weights.value(record.gains, (model.hidden,))], at)
    gate = activate(ctx, record.input.activation, linear(ctx, record.input.gate, first), at)
    added = linear(ctx, record.input.projection, graph.node("Mul", [gate, own], at))
    added = _norm(ctx, record.input.norm, added, model.hidden)
    others = np.ones((altup.streams, 1), graph.numpy_type(ctx.io))
    others[0] = 0
    spread = graph.node("Mul", [_as_stream(ctx, added, at), graph.constant(others)], at)
    return graph.node("Add", [corrected, spread], at)


def _normed(ctx: Context, branch: Branch, where: str, x: str, width: int) -> str:
    record = branch.before if where == "before" else branch.after
    return x if record is None else _norm(ctx, record, x, width)


def _norm(ctx: Context, record: Norm, x: str, width: int) -> str:
    return norm(ctx, record, x, width, module_of(record.weight))


def _laurel(ctx: Context, record: Laurel, x: str, width: int) -> str:
    low = linear(ctx, record.second, linear(ctx, record.first, x))
    return ctx.graph.node("Add", [x, _norm(ctx, record.norm, low, width)], module_of(record.first.weight))


def _coefficients(ctx: Context, record: AltUpLayer, projection: Projection, x: str, width: int, at: str) -> str:
    """What `projection` makes of ``tanh(router(norm(x) / D))``."""
    routed = linear(ctx, record.router, _norm(ctx, record.norm, x, width), alpha=1 / width)
    return linear(ctx, projection, ctx.graph.node("Tanh", [routed], at))


def _predicted(ctx: Context, altup: AltUp, record: AltUpLayer, streams: str, width: int, at: str) -> str:
    graph, number = ctx.graph, altup.streams
    mixing = _coefficients(ctx, record, record.predict, _stream(ctx, streams, altup.active, at), width, at)
    mixing = ctx.reshaped(mixing, (*((-1,) if ctx.flat else (0, 0)), number, number), at)
    return graph.node("Add", [streams, graph.node("MatMul", [mixing, streams], at)], at)


def _corrected(ctx: Context, record: AltUpLayer, predicted: str, active: str, y: str, width: int, at: str) -> str:
    graph = ctx.graph
    shares = _coefficients(ctx, record, record.correct, y, width, at)
    shares = graph.node("Add", [shares, graph.number(1.0, ctx.io)], at)
    news = _as_stream(ctx, graph.node("Sub", [y, active], at), at)
    shared = graph.node("Mul", [news, graph.node("Unsqueeze", [shares, graph.ints(-1)], at)], at)
    return graph.node("Add", [predicted, shared], at)


def _layer_inputs(ctx: Context, model: Model, x: str) -> list[str]:
    """Each layer's own embedding, in the rank of the hidden states."""
    record, graph = model.embedding.per_layer, ctx.graph
    assert record is not None
    at, layers = module_of(record.projection.weight), len(model.layers)
    shape = (*((-1,) if ctx.flat else (0, 0)), layers, record.width)
    told = ctx.reshaped(linear(ctx, record.projection, x, alpha=1 / math.sqrt(model.hidden)), shape, at)
    told = _norm(ctx, record.norm, told, record.width)
    both = graph.node("Add", [told, ctx.reshaped(_rows(ctx, record), shape, at)], at)
    both = graph.node("Mul", [both, graph.number(1 / math.sqrt(2), ctx.io)], at)
    return [_stream(ctx, both, number, at) for number in range(layers)]


def _rows(ctx: Context, record: LayerEmbeddings) -> str:
    """Rows of the table, scaled; ids that it does not have read the first."""
    graph, at, width = ctx.graph, module_of(record.table), record.projection.outputs
    ids = ctx.reshaped(ctx.ids, (-1,), at) if ctx.flat else ctx.ids
    known = graph.node("Less", [ids, graph.number(record.rows, DType.I64)], at)
    ids = graph.node("Mul", [ids, graph.cast(known, DType.I64, at)], at)
    x = rows_of_table(ctx, record.table, (record.rows, width), ids, at)
    if record.table in ctx.slotted:
        x = lora_slot(ctx, record.table, ids, x, record.rows, width, rows=True)
    stored = ctx.weights.stored_type(record.table, (record.rows, width))
    scale = record.scale
    if stored in (DType.F16, DType.BF16):
        scale = float(np.array(scale, graph.numpy_type(stored)))
    return graph.node("Mul", [x, graph.number(scale, ctx.io)], at)
