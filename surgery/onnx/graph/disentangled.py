# SPDX-License-Identifier: Apache-2.0
"""Scores of contents with embeddings of distances (DeBERTa), as numbers that the attention operator adds to its own.

Queries and keys meet every row of the table once; a gather over the flat result then takes, for each pair of tokens, the
number of its distance. Its indices are the same for all rows of a batch and all heads: ``(S, S)``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from surgery.onnx.graph.context import Context, module_of
from surgery.onnx.graph.linear import linear
from surgery.onnx.graph.norm import norm
from surgery.onnx.graph.seen_keys import SeenKeys
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import Attention, Disentangled, Projection

__all__ = ["DistanceScores", "rows_of"]

_ROUNDING = 1e-6
"""More than rounding, less than the step from one distance to the next: buckets end where the rule says."""


class DistanceScores:
    """The added scores of one encoder graph; its layers share the table and the indices."""

    def __init__(self, ctx: Context, seen: SeenKeys) -> None:
        self._ctx, self._graph, self._seen = ctx, ctx.graph, seen
        self._tables: dict[Disentangled, str] = {}
        self._indices: dict[Disentangled, tuple[str, str]] = {}

    def scores(self, record: Attention, q: str, k: str, width: int, at: str) -> str:
        """``(B, heads, S, S)``, scaled, of queries and keys ``(B, S, heads * head_dim)``."""
        distances, graph = record.disentangled, self._graph
        assert distances is not None
        shared = replace(distances, keys=None, queries=None)
        if shared not in self._tables:
            self._tables[shared] = self._table(shared, width)
            self._indices[shared] = self._index(shared)
        found = []
        pairs = zip((q, k), (distances.keys, distances.queries), self._indices[shared], strict=True)
        for values, projection, index in pairs:
            if projection is not None:
                scores = self._with_rows(record, values, projection, self._tables[shared], at)
                flat = graph.node("Reshape", [scores, graph.ints(0, 0, -1)], at)
                found.append(graph.node("Gather", [flat, index], at, axis=2))
        total = graph.node("Add", found, at) if len(found) > 1 else found[0]
        return graph.node("Mul", [total, graph.number(record.scale, self._ctx.io)], at)

    def _with_rows(self, record: Attention, values: str, projection: Projection, table: str, at: str) -> str:
        """Products with every row of the table: ``(B, heads, S, rows)``."""
        graph, sizes = self._graph, (record.heads, record.head_dim)
        rows = self._ctx.reshaped(linear(self._ctx, projection, table), (-1, *sizes), at)
        rows = graph.node("Transpose", [rows], at, perm=[1, 2, 0])
        heads = self._ctx.reshaped(values, (0, 0, *sizes), at)
        return graph.node("MatMul", [graph.node("Transpose", [heads], at, perm=[0, 2, 1, 3]), rows], at)

    def _table(self, record: Disentangled, width: int) -> str:
        table = self._ctx.weights.value(record.table, (2 * record.span, width))
        at = module_of(record.table)
        return table if record.norm is None else norm(self._ctx, record.norm, table, width, at)

    def _index(self, record: Disentangled) -> tuple[str, str]:
        """Where the number of a query and a key is in what queries, or keys, have with all rows ``(S, S)``."""
        graph, at = self._graph, module_of(record.table)
        rows = rows_of(record)
        reach = len(rows) // 2
        own = graph.node("Unsqueeze", [self._seen.places, graph.ints(1)], at)
        distance = graph.node("Sub", [own, self._seen.places], at)
        distance = graph.node("Max", [distance, graph.number(-reach, DType.I64)], at)
        distance = graph.node("Min", [distance, graph.number(reach, DType.I64)], at)
        row = graph.node("Add", [distance, graph.number(reach, DType.I64)], at)
        row = graph.node("Gather", [graph.constant(rows), row], at, axis=0)
        step = graph.number(2 * record.span, DType.I64)
        starts = (graph.node("Mul", [place, step], at) for place in (own, self._seen.places))
        first, second = (graph.node("Add", [start, row], at) for start in starts)
        return first, second


def rows_of(record: Disentangled) -> npt.NDArray[np.int64]:
    """The row of every distance of a key before its query, up to where all further ones have the same."""
    reach = record.max_distance if record.buckets else record.span
    return np.array([_row(record, distance) for distance in range(-reach, reach + 1)], np.int64)


def _row(record: Disentangled, distance: int) -> int:
    half, away, bucket = record.buckets // 2, abs(distance), distance
    if record.buckets and away > half:
        share = math.log(away / half) / math.log((record.max_distance - 1) / half)
        bucket = half + math.ceil(share * (half - 1) - _ROUNDING)
        bucket = bucket if distance > 0 else -bucket
    return min(max(bucket + record.span, 0), 2 * record.span - 1)
