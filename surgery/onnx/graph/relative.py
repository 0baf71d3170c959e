# SPDX-License-Identifier: Apache-2.0
"""What the distance of query and key adds to the scores.

The bucket of every distance is a constant, worked out here in float64: in a graph, rounding of a runtime's logarithm
would decide which side of a boundary a distance falls on.
"""

from __future__ import annotations

import math

import numpy as np

from surgery.onnx.graph.context import Context, module_of
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import RelativeBias

__all__ = ["bucket_of", "masked", "relative_bias"]

_ROUNDING = 1e-6
"""Boundaries of buckets are exact in the papers' rules; this is more than rounding and less than the step of a distance."""


def relative_bias(ctx: Context, record: RelativeBias, heads: int, distance: str) -> str:
    """The addition ``(heads, S, T)``; `distance`, ``(S, T)`` int64, is how far the key lies behind the query."""
    graph, at = ctx.graph, module_of(record.table)
    most = record.max_distance
    table = ctx.weights.value(record.table, (record.buckets, heads))
    rows = graph.constant(np.array([bucket_of(record, d) for d in range(-most, most + 1)], np.int64))
    by_distance = graph.node("Transpose", [graph.node("Gather", [table, rows], at, axis=0)], at, perm=[1, 0])
    near = graph.node("Clip", [distance, graph.number(-most, DType.I64), graph.number(most, DType.I64)], at)
    return graph.node("Gather", [by_distance, graph.node("Add", [near, graph.ints(most)], at)], at, axis=1)


def bucket_of(record: RelativeBias, distance: int) -> int:
    """Bucket of a key `distance` behind the query."""
    buckets = record.buckets // 2 if record.bidirectional else record.buckets
    first = buckets if record.bidirectional and distance > 0 else 0
    away = abs(distance) if record.bidirectional else max(-distance, 0)
    exact = buckets // 2
    if away < exact:
        return first + away
    scale = math.log(away / exact) / math.log(record.max_distance / exact)
    return first + min(buckets - 1, exact + math.floor(scale * (buckets - exact) + _ROUNDING))


def masked(ctx: Context, scores: str, allowed: str) -> str:
    """Additions to the scores, and for keys that are not `allowed` the lowest number."""
    kind = ctx.graph.numpy_type(ctx.io)
    lowest = ctx.graph.constant(np.array(np.finfo(np.float16).min if kind == np.float16 else -3.3e38, kind))
    return ctx.graph.node("Where", [allowed, scores, lowest], "")
