# SPDX-License-Identifier: Apache-2.0
"""Relative positions as a bias of the scores: the table's rows by distance, worked out here, and gathered in the graph."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.graph.context import Context, module_of
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import RelativeBias

__all__ = ["buckets_of", "masked_bias", "relative_bias"]


def relative_bias(ctx: Context, record: RelativeBias, heads: int, queries: str, keys: str) -> str:
    """The bias ``(heads, queries, keys)`` of queries and keys at these places, vectors of int64."""
    graph, at, reach = ctx.graph, module_of(record.table), record.max_distance
    table = ctx.weights.value(record.table, (record.buckets, heads))
    by_distance = graph.node("Gather", [table, graph.constant(buckets_of(record))], at, axis=0)
    rows = graph.node("Unsqueeze", [queries, graph.ints(1)], at)
    columns = graph.node("Unsqueeze", [keys, graph.ints(0)], at)
    distance = graph.node("Sub", [columns, rows], at)
    distance = graph.node("Max", [distance, graph.number(-reach, DType.I64)], at)
    distance = graph.node("Min", [distance, graph.number(reach, DType.I64)], at)
    distance = graph.node("Add", [distance, graph.number(reach, DType.I64)], at)
    values = graph.node("Gather", [by_distance, distance], at, axis=0)
    return graph.node("Transpose", [values], at, perm=[2, 0, 1])


def masked_bias(ctx: Context, bias: str, allowed: str) -> str:
    """A mask of numbers: `bias` where a key is `allowed`, else -inf."""
    return ctx.graph.node("Where", [allowed, bias, ctx.graph.number(-math.inf, ctx.io)], "")


def buckets_of(record: RelativeBias) -> npt.NDArray[np.int64]:
    """The bucket of every distance of a key behind its query, from ``-max_distance`` to ``max_distance``.

    The logarithm is float32's, as in all programs that trained such tables: their buckets end where it rounds.
    """
    distances = np.arange(-record.max_distance, record.max_distance + 1)
    size = record.buckets // 2 if record.both_ways else record.buckets
    first = np.where(distances > 0, size, 0) if record.both_ways else 0
    steps = np.abs(distances) if record.both_ways else np.maximum(-distances, 0)
    exact = size // 2
    share: npt.NDArray[Any] = np.log(np.maximum(steps, 1).astype(np.float32) / np.float32(exact))
    share = share / np.float32(math.log(record.max_distance / exact)) * np.float32(size - exact)
    wide = np.minimum(exact + share.astype(np.int64), size - 1)
    return np.asarray(first + np.where(steps < exact, steps, wide), np.int64)
