# SPDX-License-Identifier: Apache-2.0
"""Element by element: does a graph hold what a piece says, before anything is claimed of it or written into it?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.onnx.locate.aspect import bits, differing, rounded_bits
from surgery.onnx.locate.matrix import Matrix
from surgery.onnx.locate.pieces import LocatedPiece, selector
from surgery.onnx.locate.turning import turned
from surgery.onnx.locate.wanted import Wanted
from surgery_formats.tensors.views import Index

if TYPE_CHECKING:
    import numpy

__all__ = ["differing_rows", "is_there", "is_weight_there", "rows_there", "weight_blocks"]

_BLOCK = 1 << 18  # elements of a block: two of them, turned, stay in a core's cache
_STRIP = 1 << 22  # the same where columns of a matrix are read that is too large to be held
_HELD = 1 << 26  # bytes of a matrix that is read whole in order to see its columns


def weight_blocks(piece: LocatedPiece, elements: int = _BLOCK) -> Iterator[tuple[int, int, numpy.ndarray]]:
    """The rows of the weight's matrix that a piece needs, in blocks: first row, row behind the last, values."""
    weight = piece.weight
    first, stop = (0, weight.rows) if piece.flipped else (min(piece.rows), max(piece.rows) + 1)
    height = max(1, elements // max(weight.cols, 1))
    try:
        for start in range(first, stop, height):
            end = min(start + height, stop)
            yield start, end, weight.block(start, end)
    finally:
        weight.release()


def is_there(piece: LocatedPiece) -> bool:
    """Whether all elements of an exact piece are in the graph, bit for bit."""
    return not any(len(rows) for rows in _differences(piece, early=True))


def is_weight_there(piece: LocatedPiece, weight: Wanted) -> bool:
    """Whether another weight, as it is or transposed, is where a piece has its own."""
    for flipped in (piece.flipped, not piece.flipped):
        rows, width = (weight.cols, weight.rows) if flipped else (weight.rows, weight.cols)
        own = piece.weight.rows if piece.flipped else piece.weight.cols
        if (rows, width) == (len(piece.rows), own) and is_there(replace(piece, weight=weight, flipped=flipped)):
            return True
    return False


def differing_rows(piece: LocatedPiece) -> set[int]:
    """Which entries of `LocatedPiece.rows` are not in the graph."""
    return {row for rows in _differences(piece, early=False) for row in rows}


def _differences(piece: LocatedPiece, *, early: bool) -> Iterator[list[int]]:
    """Entries of `LocatedPiece.rows` (positions in it) that differ, block by block of the weight."""
    import numpy

    place = piece.place
    assert isinstance(place, Matrix)
    there = rows_there(piece)
    for start, end, block in weight_blocks(piece, there.block):
        if piece.flipped:  # rows of the weight are columns here: all entries, a part of each
            mine = rounded_bits(block, place.dtype)[:, selector(piece.rows)]
            wrong = differing(mine, there.part(piece.graph_rows, start, end).T, place.dtype).any(axis=0)
            entries = numpy.flatnonzero(wrong)
        else:
            chosen, own = _inside(piece.rows, start, end)
            mine = rounded_bits(block[own], place.dtype)
            graph_rows = _pick(piece.graph_rows, chosen)
            theirs = there.part(graph_rows, 0, place.rows if piece.turned else place.cols)
            both = (turned(mine), theirs.T) if piece.turned else (mine, theirs)
            wrong = differing(*both, place.dtype)
            wrong = wrong.T if piece.turned else wrong
            entries = (
                numpy.asarray(chosen)[numpy.flatnonzero(wrong.any(axis=1))] if wrong.any() else numpy.empty(0, int)
            )
        yield [int(entry) for entry in entries]
        if early and len(entries):
            return


class _There:
    """Rows of a graph's matrix, as a piece sees it; a matrix that is turned is read whole if it is not too large."""

    def __init__(self, piece: LocatedPiece, place: Matrix) -> None:
        self._place, self._turned = place, piece.turned
        across = piece.turned or piece.flipped
        held = across and place.dtype.nbytes(place.numel) <= _HELD
        self.block = _STRIP if across and not held else _BLOCK
        self._whole = bits(place.block(0, place.rows), place.dtype) if held else None

    def part(self, rows: Index, first: int, stop: int) -> numpy.ndarray:
        """Bits of some rows, of their columns ``[first, stop)``."""
        place = self._place
        low, high = min(rows), max(rows) + 1
        inside = slice(None) if isinstance(rows, range) else [row - low for row in rows]
        found: numpy.ndarray
        if self._whole is not None:
            whole = self._whole.T if self._turned else self._whole
            found = whole[low:high, first:stop][inside]
        elif self._turned:
            found = bits(place.columns(low, high)[first:stop], place.dtype).T[inside]
        elif stop - first == place.cols:
            found = bits(place.block(low, high), place.dtype)[inside]
        else:
            found = bits(place.columns(first, stop)[low:high], place.dtype)[inside]
        return found


def rows_there(piece: LocatedPiece) -> _There:
    """The graph's side of a piece."""
    assert isinstance(piece.place, Matrix)
    return _There(piece, piece.place)


def _inside(index: Index, start: int, end: int) -> tuple[Index, slice | list[int]]:
    """Entries of an index that lie in ``[start, end)``, and where in a block that begins at `start`."""
    if isinstance(index, range):
        low, high = max(index.start, start), min(index.stop, end)
        return range(low - index.start, high - index.start), slice(low - start, high - start)
    entries = [entry for entry, row in enumerate(index) if start <= row < end]
    return tuple(entries), [index[entry] - start for entry in entries]


def _pick(index: Index, entries: Index) -> Index:
    if isinstance(index, range) and isinstance(entries, range):
        return index[entries.start : entries.stop]
    return tuple(index[entry] for entry in entries)
