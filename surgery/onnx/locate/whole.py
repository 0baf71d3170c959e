# SPDX-License-Identifier: Apache-2.0
"""The common case: a matrix of a graph is one weight, or whole weights one below the other.

A weight is looked up by the first elements of the row where it would begin, and some of its elements from all over must
agree. Both the weight and the graph's matrix may be transposed: weights that lie side by side are found so, too. This
proposes; `surgery.onnx.locate.compare` decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from surgery.onnx.locate.aspect import Aspect, differing, head_of, key_of, rounded_bits
from surgery.onnx.locate.matrix import Matrix
from surgery.onnx.locate.pieces import LocatedPiece
from surgery.onnx.locate.wanted import KEY, Wanted
from surgery_formats.dtypes import DType

__all__ = ["Beginnings", "agrees", "whole_weights"]


class _Variant(NamedTuple):
    weight: Wanted
    flipped: bool

    @property
    def rows(self) -> int:
        return self.weight.cols if self.flipped else self.weight.rows


class Beginnings:
    """Where weights begin: by the width of their rows, and the first elements of the first one."""

    def __init__(self, weights: Iterable[Wanted]) -> None:
        self._weights = [weight for weight in weights if not weight.is_vector]
        self._of_type: dict[DType, dict[tuple[int, bytes], list[_Variant]]] = {}

    def at(self, dtype: DType, width: int, key: bytes) -> Sequence[_Variant]:
        """The weights of rows of `width` that begin with `key` once they are stored as `dtype`."""
        return self._table(dtype).get((width, key), ())

    def _table(self, dtype: DType) -> dict[tuple[int, bytes], list[_Variant]]:
        if dtype not in self._of_type:
            table = self._of_type[dtype] = {}
            for weight in self._weights:
                for flipped, width in ((False, weight.cols), (True, weight.rows)):
                    key = key_of(head_of(weight, flipped=flipped), dtype)
                    table.setdefault((width, key), []).append(_Variant(weight, flipped))
        return self._of_type[dtype]


def whole_weights(matrices: Sequence[Matrix], beginnings: Beginnings) -> list[LocatedPiece]:
    """The weights that one of these ways to see a tensor consists of; empty if none does."""
    numel = max((matrix.numel for matrix in matrices), default=0)
    for matrix in matrices:
        if matrix.cols > 1 and matrix.numel == numel and (pieces := _whole(matrix, beginnings)):
            return pieces
    stack = [_whole(matrix, beginnings) for matrix in matrices if matrix.numel < numel]
    return [piece for pieces in stack for piece in pieces] if all(stack) else []


def _whole(matrix: Matrix, beginnings: Beginnings) -> list[LocatedPiece]:
    """The weights that a matrix consists of, seen one way or the other."""
    for turned in (False, True):
        if pieces := _chain(Aspect(matrix, turned), matrix, beginnings):
            return [_upright(pieces[0])] if len(pieces) == 1 else pieces
    return []


def _upright(piece: LocatedPiece) -> LocatedPiece:
    """A weight alone, transposed, as rows of its own that are columns of the graph's matrix."""
    if not piece.flipped:
        return piece
    rows = range(piece.weight.rows)
    return replace(piece, turned=not piece.turned, flipped=False, graph_rows=rows, rows=rows)


def _chain(aspect: Aspect, matrix: Matrix, beginnings: Beginnings) -> list[LocatedPiece]:
    pieces: list[LocatedPiece] = []
    at, cols = 0, list(range(min(KEY, aspect.width)))
    while at < aspect.rows:
        key = key_of(aspect.points([at], cols)[0], matrix.dtype)
        found = [
            variant
            for variant in beginnings.at(matrix.dtype, aspect.width, key)
            if at + variant.rows <= aspect.rows and agrees(aspect, at, variant.weight, matrix.dtype, variant.flipped)
        ]
        longest = max((variant.rows for variant in found), default=0)
        found = [variant for variant in found if variant.rows == longest]
        if not found:
            return []
        (weight, flipped), also = found[0], tuple(dict.fromkeys(v.weight for v in found if v.weight is not found[0][0]))
        rows = range(at, at + longest)
        pieces.append(LocatedPiece(weight, matrix, aspect.turned, flipped, rows, range(longest), also=also))
        at += longest
    return pieces


def agrees(aspect: Aspect, at: int, weight: Wanted, dtype: DType, flipped: bool) -> bool:
    """Whether some elements of a weight are what the graph holds from row `at` on."""
    rows, cols = weight.sampled
    values = weight.sample
    if flipped:
        rows, cols, values = cols, rows, values.T
    there = aspect.points([at + row for row in rows], cols)
    return not differing(rounded_bits(values, dtype), rounded_bits(there, dtype), dtype).any()
