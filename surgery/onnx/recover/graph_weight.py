# SPDX-License-Identifier: Apache-2.0
"""A weight of a checkpoint as a graph has it: a storage that reads the pieces it lies in."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy

from surgery.onnx.locate.coded_matrix import CodedMatrix
from surgery.onnx.locate.matrix import Matrix
from surgery.onnx.locate.pieces import LocatedPiece, Place, selector
from surgery.onnx.locate.wanted import Wanted
from surgery_formats.arrays import Array, assign
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import PartBytes, StoredPart
from surgery_formats.storage.plain import Elements
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.tensors.views import Index

__all__ = ["GraphWeight", "stored_type"]

_HELD = threading.local()


@dataclass(frozen=True, eq=False)
class GraphWeight:
    """A weight in pieces of a graph; a thread that reads it holds the last matrix that was turned.

    Attributes:
        weight: The checkpoint's.
        pieces: Together all of it.
        dtype: Type to store it in.
        folds: The vectors that columns of pieces are multiplied by, in their order; None for a piece without one.
    """

    weight: Wanted
    pieces: tuple[LocatedPiece, ...]
    dtype: DType
    folds: tuple[Wanted | None, ...]

    group = 1
    elements = None
    is_float = True

    @property
    def name(self) -> str:
        """The checkpoint's."""
        return self.weight.name

    @property
    def sizes(self) -> tuple[int, ...]:
        """The checkpoint's."""
        return self.weight.storage.sizes

    @property
    def shape(self) -> tuple[int, int]:
        """The checkpoint's."""
        return self.weight.storage.shape

    @property
    def kind(self) -> str:
        """Name of the element type."""
        return self.dtype.label

    @property
    def transposed(self) -> bool:
        """As the checkpoint has it."""
        return self.weight.storage.transposed

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """The tensors of the graph that have a place."""
        found = []
        for piece in self.pieces:
            place = piece.place
            found.append(place.tensor if isinstance(place, Matrix) else place.codes.tensor)
        return tuple(dict.fromkeys(tensor for tensor in found if tensor is not None))

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """One tensor of elements."""
        return Elements(self.sizes, self.shape, self.dtype).parts(name)

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """See `Elements.put`."""
        return Elements(self.sizes, self.shape, self.dtype).put(start, block, rounded)

    def read_into(self, block: Array, start: int) -> None:
        """Fill `block` with the rows from `start`, as the graph has them."""
        stop = start + len(block)
        for piece, fold in zip(self.pieces, self.folds, strict=True):
            if self.weight.is_vector:
                self._vector(block, start, piece)
            elif piece.flipped:
                values = _rows(piece.place, piece.turned, piece.graph_rows)[:, start:stop].T
                block[:, selector(piece.rows)] = values
            else:
                entries = [number for number, row in enumerate(piece.rows) if start <= row < stop]
                if not entries:
                    continue
                first, last = entries[0], entries[-1] + 1
                runs = isinstance(piece.rows, range) and isinstance(piece.graph_rows, range)
                graph_rows = piece.graph_rows[first:last] if runs else tuple(piece.graph_rows[n] for n in entries)
                values = _rows(piece.place, piece.turned, graph_rows)
                if piece.is_scaled:
                    values = self._undone(values, piece, fold, entries)
                own = piece.rows[first:last] if runs else tuple(piece.rows[n] for n in entries)
                rows = numpy.empty(values.shape, block.dtype)
                assign(rows, numpy.ascontiguousarray(values))
                block[selector(own, start)] = rows

    def _undone(
        self, values: numpy.ndarray, piece: LocatedPiece, fold: Wanted | None, entries: list[int]
    ) -> numpy.ndarray:
        """Values without the factors that the exporter multiplied them by."""
        undone: numpy.ndarray = values.astype("f8") / piece.factor
        if piece.row_factors:
            undone /= numpy.array(piece.row_factors)[entries][:, None]
        if fold is not None:
            undone /= fold.block(0, fold.rows).reshape(-1).astype("f8") + piece.fold_plus
        return undone

    def _vector(self, block: Array, start: int, piece: LocatedPiece) -> None:
        place = piece.place
        assert isinstance(place, Matrix)
        values = place.flat(0, place.numel)[selector(piece.graph_rows)].reshape(self.shape)
        assign(block, numpy.ascontiguousarray(values[start : start + len(block)]))


def _rows(place: Place, turned: bool, rows: Index) -> numpy.ndarray:
    """Some rows of a matrix, or some columns as rows."""
    if not turned:
        low, high = min(rows), max(rows) + 1
        values: numpy.ndarray = place.block(low, high)[selector(rows, low)]
        return values
    if getattr(_HELD, "place", None) is not place:
        _HELD.place = None
        _HELD.values = place.block(0, place.rows)
        _HELD.place = place
    held: numpy.ndarray = _HELD.values
    return held[:, selector(rows)].T


def stored_type(pieces: tuple[LocatedPiece, ...]) -> DType:
    """The type of the graph's numbers; of codes that of their scales."""
    place = pieces[0].place
    return place.scale_dtype if isinstance(place, CodedMatrix) else place.dtype
