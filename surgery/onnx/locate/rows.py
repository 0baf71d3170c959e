# SPDX-License-Identifier: Apache-2.0
"""The general case: rows of weights in any order and number, each found by its first elements.

Slices, permuted rows (rotary weights in pairs), interleaved projections and weights among tensors of other origin are
found so. A row that begins like several is settled by the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.onnx.locate.aspect import Aspect, rounded_bits
from surgery.onnx.locate.matrix import Matrix
from surgery.onnx.locate.pieces import LocatedPiece, compact
from surgery.onnx.locate.wanted import KEY, Wanted
from surgery_formats.dtypes import DType

if TYPE_CHECKING:
    import numpy

__all__ = ["RowIndex", "scattered_rows"]

_LEAST = 4  # elements of a row by which it can be told


@dataclass(frozen=True)
class _Rows:
    """The rows of all weights of one width: their keys in order, and whose row each is."""

    keys: numpy.ndarray
    owner: numpy.ndarray
    row: numpy.ndarray


class RowIndex:
    """Every row and every column of the weights, by its first elements; made for the widths that are asked for."""

    def __init__(self, weights: Iterable[Wanted]) -> None:
        self._weights = [weight for weight in weights if not weight.is_vector]
        self._heads: dict[tuple[int, bool], numpy.ndarray] = {}
        self._tables: dict[tuple[DType, int], _Rows] = {}

    def variant(self, owner: int) -> tuple[Wanted, bool]:
        """The weight, and whether its columns are the rows."""
        return self._weights[owner // 2], bool(owner % 2)

    def table(self, dtype: DType, width: int) -> _Rows:
        """The rows of `width`."""
        import numpy

        if (dtype, width) in self._tables:
            return self._tables[dtype, width]
        keys, owners, rows = [], [], []
        for number, weight in enumerate(self._weights):
            for flipped in (False, True):
                if (weight.rows if flipped else weight.cols) != width:
                    continue
                heads = self._head(number, flipped)
                keys.append(_hashed(heads, dtype))
                owners.append(numpy.full(len(heads), number * 2 + flipped))
                rows.append(numpy.arange(len(heads)))
        joined = [numpy.concatenate(parts) if parts else numpy.empty(0, int) for parts in (keys, owners, rows)]
        order = numpy.argsort(joined[0], kind="stable")
        self._tables[dtype, width] = _Rows(*(part[order] for part in joined))
        return self._tables[dtype, width]

    def _head(self, number: int, flipped: bool) -> numpy.ndarray:
        if (number, flipped) not in self._heads:
            weight = self._weights[number]
            heads = weight.block(0, min(KEY, weight.rows)).T if flipped else weight.heads()
            self._heads[number, flipped] = heads
        return self._heads[number, flipped]


def _hashed(heads: numpy.ndarray, dtype: DType) -> numpy.ndarray:
    """A number for each row of at most `KEY` elements, equal where their bits are equal once stored as `dtype`."""
    import numpy

    words = rounded_bits(heads, dtype).astype(numpy.uint64)
    hashed = numpy.full(len(words), words.shape[1], numpy.uint64)
    with numpy.errstate(over="ignore"):
        for column in words.T:
            hashed = (hashed ^ column) * numpy.uint64(0x9E3779B97F4A7C15)
            hashed ^= hashed >> numpy.uint64(29)
    return hashed


def scattered_rows(matrices: Sequence[Matrix], index: RowIndex) -> list[LocatedPiece]:
    """The rows of weights in a tensor, seen the way that shows most; nothing is compared beyond their beginnings."""
    best: list[LocatedPiece] = []
    best_share = 0.0
    for matrix in matrices:
        for turned in (False, True):
            aspect = Aspect(matrix, turned)
            if aspect.width < _LEAST or aspect.rows < 2:
                continue
            pieces = _pieces(aspect, matrix, index)
            share = sum(len(piece.rows) for piece in pieces) / aspect.rows * matrix.numel
            if share > best_share:
                best, best_share = pieces, share
    return best


def _pieces(aspect: Aspect, matrix: Matrix, index: RowIndex) -> list[LocatedPiece]:
    import numpy

    table = index.table(matrix.dtype, aspect.width)
    if not len(table.keys):
        return []
    keys = _hashed(aspect.heads(), matrix.dtype)
    low = numpy.searchsorted(table.keys, keys, "left")
    high = numpy.searchsorted(table.keys, keys, "right")
    owner = numpy.full(len(keys), -1)
    row = numpy.full(len(keys), -1)
    single = high - low == 1
    owner[single], row[single] = table.owner[low[single]], table.row[low[single]]
    several = numpy.flatnonzero(high - low > 1)
    for order, step in ((several, 1), (several[::-1], -1)):
        for at in order:
            beside = at - step
            if owner[at] >= 0 or not 0 <= beside < len(keys) or owner[beside] < 0:
                continue
            span = slice(low[at], high[at])
            fits = (table.owner[span] == owner[beside]) & (table.row[span] == row[beside] + step)
            if fits.any():
                owner[at], row[at] = owner[beside], row[beside] + step
    doubtful = [
        at for at in several.tolist() if owner[at] >= 0 and _is_doubtful(at, owner, row, table, low[at], high[at])
    ]
    owner[doubtful] = -1
    pieces = []
    for number in numpy.unique(owner[owner >= 0]):
        there = numpy.flatnonzero(owner == number)
        weight, flipped = index.variant(int(number))
        pieces.append(
            LocatedPiece(weight, matrix, aspect.turned, flipped, compact(there.tolist()), compact(row[there].tolist()))
        )
    return pieces


def _is_doubtful(at: int, owner: numpy.ndarray, row: numpy.ndarray, table: _Rows, low: int, high: int) -> bool:
    """Whether the row on one side says that this is another of several equal rows than the row on the other side says."""
    for step in (-1, 1):
        beside = at + step
        if 0 <= beside < len(owner) and owner[beside] >= 0:
            fits = (table.owner[low:high] == owner[beside]) & (table.row[low:high] + step == row[beside])
            own = (table.owner[low:high] == owner[at]) & (table.row[low:high] == row[at])
            if (fits & ~own).any():
                return True
    return False
