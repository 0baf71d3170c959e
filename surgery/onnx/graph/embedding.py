# SPDX-License-Identifier: Apache-2.0
"""From token ids to the first hidden states."""

from __future__ import annotations

import numpy as np

from surgery.onnx.graph.coded import coded_rows
from surgery.onnx.graph.context import Context, ResidualStream, module_of
from surgery.onnx.graph.linear import linear, lora_slot
from surgery.onnx.graph.virtual_tokens import rows_after, types_in_front
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import Embedding, Model

__all__ = ["encoder_rows", "position_table", "rows_of_table", "token_rows"]


def token_rows(ctx: Context, model: Model) -> str:
    """Look up rows of the token table and scale them; in the rank of the hidden states.

    Virtual rows are scaled if the model scales all inputs (Granite), not if the scale belongs to its table (Gemma).
    """
    record = model.embedding
    at = module_of(record.tokens)
    width = model.embedded[0]
    shape = (model.vocabulary, width)
    coded = ctx.weights.table(record.tokens, shape)
    table = ctx.weights.value(record.tokens, shape) if not ctx.weights.has_codes else ""
    if ctx.virtual.embedded:
        if ctx.weights.has_codes and coded is None:
            ctx.weights.find(record.tokens, shape)  # it is read by a tied head alone
        x = ctx.reshaped(ctx.ids, (-1, width), at) if ctx.flat else ctx.ids
        return x if record.scale_rounded else _scaled(ctx, model, x, width, at)
    ids = ctx.reshaped(ctx.ids, (-1,), at) if ctx.flat else ctx.ids
    rows = ctx.virtual.rows
    known = ids
    if rows is not None:
        known = ctx.graph.node("Min", [ids, ctx.graph.number(model.vocabulary - 1, DType.I64)], at)
    if table:
        x = ctx.graph.node("Gather", [table, known], at, axis=0)
    elif coded is not None:
        x = coded_rows(ctx.graph, coded, known, ctx.io, at)
    else:
        x = _converted_rows(ctx, record.tokens, shape, known, at)
    if record.tokens in ctx.slotted:
        x = lora_slot(ctx, record.tokens, known, x, model.vocabulary, width, rows=True)
    if record.scale_rounded:
        x = _scaled(ctx, model, x, width, at)
    if rows is not None:
        x = rows_after(ctx.graph, x, ids, model.vocabulary, rows, ctx.io, at)
    return x if record.scale_rounded else _scaled(ctx, model, x, width, at)


def rows_of_table(ctx: Context, name: str, shape: tuple[int, int], ids: str, at: str) -> str:
    """Rows of a table that nothing else reads, in the graph's type."""
    coded = ctx.weights.table(name, shape)
    return (
        _converted_rows(ctx, name, shape, ids, at) if coded is None else coded_rows(ctx.graph, coded, ids, ctx.io, at)
    )


def _converted_rows(ctx: Context, name: str, shape: tuple[int, int], ids: str, at: str) -> str:
    """Rows in the graph's type: only those that are read are converted, where a runtime would convert the table at load."""
    table, stored = ctx.weights.as_stored(name, shape)
    x = ctx.graph.node("Gather", [table, ids], at, axis=0)
    return x if stored is ctx.io else ctx.graph.cast(x, ctx.io, at)


def _scaled(ctx: Context, model: Model, x: str, width: int, at: str) -> str:
    if model.embedding.scale == 1.0:
        return x
    scale = _scale(ctx, model.embedding, (model.vocabulary, width))
    return ctx.graph.node("Mul", [x, ctx.graph.number(scale, ctx.io)], at)


def _scale(ctx: Context, record: Embedding, shape: tuple[int, int]) -> float:
    stored = ctx.weights.stored_type(record.tokens, shape)
    if not record.scale_rounded or stored not in (DType.F16, DType.BF16):
        return record.scale
    return float(np.array(record.scale, ctx.graph.numpy_type(stored)))


def encoder_rows(ctx: Context, model: Model) -> ResidualStream:
    """Token rows, learned positions and token types of an encoder; the last sum is left to the following norm.

    Rows that are projected before the norm are summed.
    """
    record = model.embedding
    x = token_rows(ctx, model)
    rows = []
    if record.positions or record.sinusoid:
        rows.append(_position_rows(ctx, model))
    if record.types:
        rows.append(_type_rows(ctx, model))
    for row in rows[:-1]:
        x = ctx.graph.node("Add", [x, row], module_of(record.tokens))
    stream = ResidualStream(x, rows[-1] if rows else "")
    if record.projection is None or record.projected == "norm":
        return stream
    return ResidualStream(linear(ctx, record.projection, ctx.total(stream, module_of(record.projection.weight))))


def position_table(ctx: Context, model: Model) -> str:
    """The table of positions: stored, or sines and cosines that no file holds."""
    record = model.embedding
    if record.positions:
        return ctx.weights.value(record.positions, (model.max_positions + record.position_offset, model.embedded[1]))
    width = model.embedded[1]
    turns = np.arange(record.sinusoid)[:, None] / 10000.0 ** (2 * (np.arange(width) // 2) / width)
    rows = np.concatenate([np.sin(turns[:, 0::2]), np.cos(turns[:, 1::2])], axis=1)
    return ctx.graph.constant(rows.astype(np.float32).astype(ctx.graph.numpy_type(ctx.io)), "positions")


def _position_rows(ctx: Context, model: Model) -> str:
    """Rows of the position table, by index, or counted over non-padding tokens (padding keeps its own position)."""
    record, graph = model.embedding, ctx.graph
    at = module_of(record.positions) or "positions"
    table = position_table(ctx, model)
    if record.position_rule == "nonpad":
        padding = graph.node("Equal", [ctx.ids, graph.number(record.padding_token, DType.I64)], at)
        tokens = graph.cast(graph.node("Not", [padding], at), DType.I64, at)
        counted = graph.node("CumSum", [tokens, graph.number(1, DType.I64)], at)
        if ctx.virtual.keyed:
            counted = graph.node("Add", [counted, graph.ints(ctx.virtual.keyed)], at)
        positions = graph.node("Mul", [counted, tokens], at)
        shift = record.position_offset - 1
    else:
        shape = graph.node("Shape", [ctx.ids], at)
        length = graph.node("Squeeze", [graph.node("Shape", [ctx.ids], at, start=1, end=2)], at)
        row = graph.node("Range", [graph.number(0, DType.I64), length, graph.number(1, DType.I64)], at)
        positions = graph.node("Expand", [row, shape], at)
        shift = record.position_offset + ctx.virtual.keyed
    if shift:
        positions = graph.node("Add", [positions, graph.ints(shift)], at)
    return _rows(ctx, table, positions, at)


def _type_rows(ctx: Context, model: Model) -> str:
    """Rows of the token types; a single type needs no input."""
    record = model.embedding
    at = module_of(record.types)
    number = ctx.weights.rows(record.types)
    table = ctx.weights.value(record.types, (number, model.embedded[1]))
    if number > 1:
        types = ctx.per_token("token_type_ids")
        if ctx.virtual.front:
            types = types_in_front(ctx.graph, types, ctx.virtual.front)
        return _rows(ctx, table, types, at)
    zeros = ctx.graph.node("Mul", [ctx.ids, ctx.graph.number(0, DType.I64)], at)
    return _rows(ctx, table, zeros, at)


def _rows(ctx: Context, table: str, indices: str, at: str) -> str:
    if ctx.flat:
        indices = ctx.reshaped(indices, (-1,), at)
    return ctx.graph.node("Gather", [table, indices], at, axis=0)
