# SPDX-License-Identifier: Apache-2.0
"""Rows of a weight where they belong in rows of a graph's tensor: put there, or compared with what is there."""

from __future__ import annotations

import numpy

from surgery.onnx.locate.aspect import differing, rounded_bits
from surgery.onnx.locate.matrix import Matrix
from surgery.onnx.locate.pieces import LocatedPiece, selector
from surgery.onnx.locate.turning import turned
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.text import show

__all__ = ["Scatter", "not_the_base", "same_bits"]

_WORD = 8  # bytes


class Scatter:
    """Puts rows of a weight where they belong in some rows of a tensor.

    Args:
        strip: Rows of the tensor, ``(rows, cols)`` of its matrix; they are changed in place.
        start: Which row of the tensor is the first of them.
        piece: Where the weight lies in the tensor's matrix.
    """

    def __init__(self, strip: numpy.ndarray, start: int, piece: LocatedPiece) -> None:
        place = piece.place
        offset = place.start // place.cols if isinstance(place, Matrix) else 0
        self._strip, self._piece = strip, piece
        self._low = max(0, start - offset)  # rows of the matrix that are in the strip
        self._high = min(place.rows, start + len(strip) - offset)
        self._shift = offset - start
        self._order = None if isinstance(piece.rows, range) else numpy.asarray(piece.rows)
        self._runs = isinstance(piece.rows, range) and isinstance(piece.graph_rows, range)
        self._there = None if isinstance(piece.graph_rows, range) else numpy.asarray(piece.graph_rows)

    def rows(self, first: int, block: numpy.ndarray) -> None:
        """Put `block` there: rows of the weight's matrix from `first` on, ``(count, weight.cols)``."""
        piece, low, high, shift = self._piece, self._low, self._high, self._shift
        if low >= high:
            return
        if piece.flipped:
            columns = block[:, selector(piece.rows)]
            if piece.turned:
                begin, end = max(first, low), min(first + len(block), high)
                if begin < end:
                    rows = slice(begin + shift, end + shift)
                    self._strip[rows, selector(piece.graph_rows)] = columns[begin - first : end - first]
                return
            entries = numpy.arange(len(piece.rows))
            there = self._graph_rows(entries)
            inside = (there >= low) & (there < high)
            self._strip[there[inside] + shift, first : first + len(block)] = columns[:, inside].T
            return
        entries, own = self._entries(first, len(block))
        if not len(entries):
            return
        there = self._graph_rows(entries)
        if piece.turned:
            part = self._strip[low + shift : high + shift]
            mine = block[int(own[0]) : int(own[-1]) + 1] if self._runs else block[own]
            part[:, slice(int(there[0]), int(there[-1]) + 1) if self._runs else there] = turned(mine)[low:high]
            return
        inside = (there >= low) & (there < high)
        if inside.all() and self._runs:
            self._strip[int(there[0]) + shift : int(there[-1]) + 1 + shift] = block[int(own[0]) : int(own[-1]) + 1]
        else:
            self._strip[there[inside] + shift] = block[own[inside]]

    def check(self, first: int, block: numpy.ndarray) -> None:
        """Compare rows of the base, as in `rows`, with what the tensor holds in their place; of a piece that is not flipped.

        Raises:
            FitError: it holds something else.
        """
        piece, low, high, shift = self._piece, self._low, self._high, self._shift
        entries, own = self._entries(first, len(block))
        if low >= high or not len(entries):
            return
        dtype = piece.place.dtype
        there = self._graph_rows(entries)
        mine = rounded_bits(block[int(own[0]) : int(own[-1]) + 1] if self._runs else block[own], dtype)
        held = self._strip.view(mine.dtype)
        if piece.turned:
            columns = slice(int(there[0]), int(there[-1]) + 1) if self._runs else there
            same = same_bits(turned(mine)[low:high], held[low + shift : high + shift, columns], dtype)
        else:
            inside = (there >= low) & (there < high)
            if inside.all() and self._runs:
                same = same_bits(mine, held[int(there[0]) + shift : int(there[-1]) + 1 + shift], dtype)
            else:
                same = same_bits(mine[inside], held[there[inside] + shift], dtype)
        if not same:
            raise not_the_base(piece)

    def _entries(self, first: int, count: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Entries of the piece whose rows are among ``[first, first + count)``, and which of them each is."""
        rows = self._piece.rows
        if self._order is None:
            assert isinstance(rows, range)
            low, high = max(rows.start, first), min(rows.stop, first + count)
            own = numpy.arange(low, max(low, high))
            return own - rows.start, own - first
        entries = numpy.flatnonzero((self._order >= first) & (self._order < first + count))
        return entries, self._order[entries] - first

    def _graph_rows(self, entries: numpy.ndarray) -> numpy.ndarray:
        if self._there is not None:
            chosen: numpy.ndarray = self._there[entries]
            return chosen
        assert isinstance(self._piece.graph_rows, range)
        return entries + self._piece.graph_rows.start


def same_bits(mine: numpy.ndarray, there: numpy.ndarray, dtype: DType) -> bool:
    """Whether bits are equal, but for what `differing` lets pass."""
    return numpy.array_equal(*_words(mine, there)) or not differing(mine, there, dtype).any()


def _words(mine: numpy.ndarray, there: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Eight bytes as one element, where the rows of both allow it: so many fewer comparisons."""
    size = mine.dtype.itemsize
    whole = mine.ndim == 2 and mine.shape == there.shape and not mine.shape[1] * size % _WORD
    if whole and all(side.strides[1] == size for side in (mine, there)):
        return mine.view("u8"), there.view("u8")
    return mine, there


def not_the_base(piece: LocatedPiece) -> FitError:
    """The error for a tensor that does not hold what a few of its elements said."""
    return FitError(
        f"does not hold the values of {show(piece.weight.label)}, which a few of them were",
        tensor=piece.place.name,
        hint="locate tells how far it is from the base",
    )
