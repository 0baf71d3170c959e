# SPDX-License-Identifier: Apache-2.0
"""Tables of rotary positions, from their frequencies.

A graph holds the frequencies, ``dims / 2`` numbers, and computes the tables of cosines and sines from them; runtimes do
that once, at load time. Written out, the tables of one model take up to 67 MB.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from surgery.onnx.graph.frequencies import frequencies
from surgery.onnx.graph.graph import ONNX_TYPES, Graph
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Rope

__all__ = ["RotaryTable", "RotaryTables", "longest"]

_ROWS = 1 << 24
"""Greatest number of positions; more than any model supports, but config.json may contain anything."""


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Cosines and sines as values of a graph, ``(rows, dims / 2)``.

    Attributes:
        cos: Cosines.
        sin: Sines.
        original: Longer sequences use the rows from `rows` on; 0 if there are no such rows.
        rows: Number of positions.
    """

    cos: str
    sin: str
    original: int
    rows: int


def longest(rope: Rope, requested: int | None, limit: int) -> int:
    """The number of positions of a graph: `requested`, or as many as the model supports (`limit`).

    Raises:
        FitError: more positions than a table can hold.
    """
    if (requested or limit) > _ROWS:
        raise FitError(
            f"rotary tables of {requested or limit} positions do not fit into memory",
            file="config.json",
            hint=f"`max_length={_ROWS}` or less; a table takes 4 bytes per position and value of a head",
        )
    if requested is not None and requested > rope.max_positions and rope.parameters["rope_type"] == "dynamic":
        raise FitError(
            f"dynamic rotary positions change with every token beyond {rope.max_positions}, so no graph has them",
            file="config.json",
            hint=f"`max_length={rope.max_positions}` or less",
        )
    return requested or limit


def _table(graph: Graph, rope: Rope, rows: int, io: DType) -> RotaryTable:
    """Tables of `rows` positions in type `io`; twice as many rows if long sequences have their own angles."""
    angles_per_position = frequencies(rope)
    at = "rotary"
    # integers, to be exact at any length
    positions = graph.node("Range", [graph.number(n, DType.I64) for n in (0, rows, 1)], at)
    column = graph.node("Unsqueeze", [graph.cast(positions, DType.F32, at), graph.ints(1)], at)
    angles = graph.node("Mul", [column, graph.constant(angles_per_position.usual[None])], at)
    original = 0
    if angles_per_position.long is not None and rows > angles_per_position.original:
        original = angles_per_position.original
        long = graph.node("Mul", [column, graph.constant(angles_per_position.long[None])], at)
        angles = graph.node("Concat", [angles, long], at, axis=0)

    def wave(op: str) -> str:
        value = graph.node(op, [angles], at)
        if angles_per_position.scaling != 1.0:
            value = graph.node("Mul", [value, graph.constant(np.array(angles_per_position.scaling, np.float32))], at)
        return value if io is DType.F32 else graph.node("Cast", [value], at, to=ONNX_TYPES[io])

    return RotaryTable(wave("Cos"), wave("Sin"), original, rows)


class RotaryTables:
    """The tables of one graph; layers with equal parameters share them."""

    def __init__(self, graph: Graph, rows: int, io: DType) -> None:
        """Tables of so many positions, in the type of hidden states."""
        self._graph, self._rows, self._io = graph, rows, io
        self._known: list[tuple[Rope, RotaryTable]] = []  # parameters are a mapping, which is no key

    def of(self, rope: Rope) -> RotaryTable:
        """The table of these parameters, built when first needed."""
        for known, values in self._known:
            if known == rope:
                return values
        values = _table(self._graph, rope, self._rows, self._io)
        self._known.append((rope, values))
        return values
