# SPDX-License-Identifier: Apache-2.0
"""Token ids to the first hidden states."""

from __future__ import annotations

from surgery.onnx.context import Context, module_of
from surgery_formats.dtypes import DType
from surgery_formats.families.recipe import Embedding, Model

__all__ = ["token_rows"]


def token_rows(ctx: Context, model: Model) -> str:
    """Rows of the token table, scaled; hidden states' rank."""
    record = model.embedding
    at = module_of(record.tokens)
    width = record.projection.inputs if record.projection else model.hidden
    table = ctx.weights.value(record.tokens, (model.vocabulary, width))
    ids = ctx.reshaped(ctx.ids, (-1,), at) if ctx.flat else ctx.ids
    x = ctx.graph.node("Gather", [table, ids], at, axis=0)
    if record.scale != 1.0:
        x = ctx.graph.node("Mul", [x, ctx.graph.number(_scale(ctx, record, (model.vocabulary, width)), ctx.io)], at)
    return x


def _scale(ctx: Context, record: Embedding, shape: tuple[int, int]) -> float:
    stored = ctx.weights.find(record.tokens, shape).dtype
    if not record.scale_rounded or stored not in (DType.F16, DType.BF16):
        return record.scale
    import numpy as np

    return float(np.array(record.scale, ctx.graph.numpy_type(stored)))
