# SPDX-License-Identifier: Apache-2.0
"""Token ids to the first hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgery.onnx.context import Context, Stream, module_of
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.families.recipe import Embedding, Model

if TYPE_CHECKING:
    import numpy as np

__all__ = ["encoder_rows", "token_rows"]


def token_rows(ctx: Context, model: Model) -> str:
    """Rows of the token table, scaled; hidden states' rank."""
    record = model.embedding
    at = module_of(record.tokens)
    width = record.projection.inputs if record.projection else model.hidden
    table = ctx.weights.value(record.tokens, (model.vocabulary, width))
    ids = ctx.reshaped(ctx.ids, (-1,), at) if ctx.flat else ctx.ids
    known = ids
    if ctx.rows is not None:
        known = ctx.graph.node("Min", [ids, ctx.graph.number(model.vocabulary - 1, DType.I64)], at)
    x = ctx.graph.node("Gather", [table, known], at, axis=0)
    if record.scale != 1.0:
        x = ctx.graph.node("Mul", [x, ctx.graph.number(_scale(ctx, record, (model.vocabulary, width)), ctx.io)], at)
    return x if ctx.rows is None else _with_rows(ctx, model, ctx.rows, ids, x, at)


def _with_rows(ctx: Context, model: Model, rows: np.ndarray[Any, Any], ids: str, x: str, at: str) -> str:
    """`x`, but rows of a soft prompt for ids behind the vocabulary. They are not scaled, as they were not when they were trained."""
    if rows.shape[1] != model.hidden or model.embedding.projection is not None:
        raise FitError(f"a soft prompt of {rows.shape[1]} numbers per token, the model has {model.hidden}")
    graph = ctx.graph
    behind = graph.node("Sub", [ids, graph.number(model.vocabulary, DType.I64)], at)
    zero = graph.number(0, DType.I64)
    soft = graph.node("Gather", [graph.constant(rows), graph.node("Max", [behind, zero], at)], at, axis=0)
    is_soft = graph.node("Unsqueeze", [graph.node("GreaterOrEqual", [behind, zero], at), graph.ints(-1)], at)
    return graph.node("Where", [is_soft, soft, x], at)


def _scale(ctx: Context, record: Embedding, shape: tuple[int, int]) -> float:
    stored = ctx.weights.find(record.tokens, shape).dtype
    if not record.scale_rounded or stored not in (DType.F16, DType.BF16):
        return record.scale
    import numpy as np

    return float(np.array(record.scale, ctx.graph.numpy_type(stored)))


def encoder_rows(ctx: Context, model: Model) -> Stream:
    """Token rows, learned positions and token types of an encoder; the last sum is left to the norm after it."""
    record = model.embedding
    x = token_rows(ctx, model)
    rows = []
    if record.positions:
        rows.append(_position_rows(ctx, model))
    if record.types:
        rows.append(_type_rows(ctx, model))
    for row in rows[:-1]:
        x = ctx.graph.node("Add", [x, row], module_of(record.tokens))
    return Stream(x, rows[-1] if rows else "")


def _position_rows(ctx: Context, model: Model) -> str:
    """Rows of the position table: by place, or counted over tokens that are not padding (which stays at its own position)."""
    record, graph = model.embedding, ctx.graph
    at = module_of(record.positions)
    table = ctx.weights.value(record.positions, (model.max_positions + record.position_offset, model.hidden))
    if record.position_rule == "nonpad":
        padding = graph.node("Equal", [ctx.ids, graph.number(record.padding_token, DType.I64)], at)
        tokens = graph.cast(graph.node("Not", [padding], at), DType.I64, at)
        counted = graph.node("CumSum", [tokens, graph.number(1, DType.I64)], at)
        places = graph.node("Mul", [counted, tokens], at)
        shift = record.position_offset - 1
    else:
        shape = graph.node("Shape", [ctx.ids], at)
        length = graph.node("Squeeze", [graph.node("Shape", [ctx.ids], at, start=1, end=2)], at)
        row = graph.node("Range", [graph.number(0, DType.I64), length, graph.number(1, DType.I64)], at)
        places = graph.node("Expand", [row, shape], at)
        shift = record.position_offset
    if shift:
        places = graph.node("Add", [places, graph.ints(shift)], at)
    return _rows(ctx, table, places, at)


def _type_rows(ctx: Context, model: Model) -> str:
    """Rows of the token types; where there is only one type, that one, and no input for it."""
    record = model.embedding
    at = module_of(record.types)
    number = ctx.weights.rows(record.types)
    table = ctx.weights.value(record.types, (number, model.hidden))
    if number > 1:
        kinds = ctx.graph.input("token_type_ids", DType.I64, ("batch", "sequence"))
        if ctx.prepended:
            pads = ctx.graph.ints(0, ctx.prepended, 0, 0)
            kinds = ctx.graph.node("Pad", [kinds, pads, ctx.graph.number(0, DType.I64)], at)
        return _rows(ctx, table, kinds, at)
    zeros = ctx.graph.node("Mul", [ctx.ids, ctx.graph.number(0, DType.I64)], at)
    return _rows(ctx, table, zeros, at)


def _rows(ctx: Context, table: str, places: str, at: str) -> str:
    if ctx.flat:
        places = ctx.reshaped(places, (-1,), at)
    return ctx.graph.node("Gather", [table, places], at, axis=0)
