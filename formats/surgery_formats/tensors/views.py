# SPDX-License-Identifier: Apache-2.0
"""Views: index maps from elements of a logical weight to elements of a storage. They compose and touch no bytes.

whole                a storage as it is
rows, window         a slice of a fused projection (q of qkv, gate of gate_up), and a part of a fused update
expert               one of E experts of a stacked tensor
transpose            weights stored ``(in, out)``: GPT-2's Conv1D
permute, interleaved rows in another order than the logical weight's
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from surgery_formats.arrays import Array, array_of, namespace
from surgery_formats.dtypes import DType

__all__ = [
    "Index",
    "Overlap",
    "View",
    "expert",
    "interleaved",
    "intersect",
    "permute",
    "positions",
    "rows",
    "take",
    "transpose",
    "turned",
    "whole",
    "window",
]

Index = range | tuple[int, ...]
"""Positions along one axis: a `range` wherever possible (slices cost nothing), a tuple for permutations."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Where a block of storage rows meets a logical weight.

    ``block[block_rows, block_cols]`` (transposed, if the view is) holds the logical elements ``[rows, cols]``.
    """

    block_rows: Index
    block_cols: Index
    rows: Index
    cols: Index
    transposed: bool

    def __bool__(self) -> bool:
        return len(self.rows) > 0 and len(self.cols) > 0


@dataclass(frozen=True, slots=True)
class View:
    """A logical matrix ``(len(rows), len(cols))`` inside a storage matrix.

    Attributes:
        rows: Storage row (column, if `transposed`) of each logical row.
        cols: Storage column (row, if `transposed`) of each logical column.
        transposed: The storage holds the logical weight transposed.
        row_origin: Logical row of ``rows[0]`` if the update's weight is larger than this storage (a fused adapter on a
            split checkpoint).
        col_origin: The same for columns.
    """

    rows: Index
    cols: Index
    transposed: bool = False
    row_origin: int = 0
    col_origin: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(rows, cols)`` that this view covers."""
        return len(self.rows), len(self.cols)

    def locate(self, start: int, stop: int) -> Overlap:
        """The part of this view that lies in storage rows ``[start, stop)``."""
        if not self.transposed:
            inside = _inside(self.rows, start, stop)
            return Overlap(
                _shift(_pick(self.rows, inside), -start),
                self.cols,
                _shift(inside, self.row_origin),
                range(self.col_origin, self.col_origin + len(self.cols)),
                transposed=False,
            )
        inside = _inside(self.cols, start, stop)
        return Overlap(
            _shift(_pick(self.cols, inside), -start),
            self.rows,
            range(self.row_origin, self.row_origin + len(self.rows)),
            _shift(inside, self.col_origin),
            transposed=True,
        )


def whole(shape: tuple[int, int]) -> View:
    """The storage itself."""
    return View(range(shape[0]), range(shape[1]))


def rows(view: View, start: int, stop: int, step: int = 1) -> View:
    """Logical rows ``start:stop:step`` of `view` as a weight of their own."""
    return replace(view, rows=view.rows[start:stop:step])


def window(view: View, row_origin: int = 0, col_origin: int = 0) -> View:
    """`view` as the part of a larger logical weight that begins at ``(row_origin, col_origin)``."""
    return replace(view, row_origin=view.row_origin + row_origin, col_origin=view.col_origin + col_origin)


def expert(index: int, count: int, shape: tuple[int, int]) -> View:
    """Expert `index` of `count`, each of `shape`, in a storage of ``(count * rows, cols)``.

    Raises:
        IndexError: no such expert.
    """
    if not 0 <= index < count:
        raise IndexError(f"expert {index} of {count}")
    return View(range(index * shape[0], (index + 1) * shape[0]), range(shape[1]))


def intersect(first: View, second: View) -> bool:
    """Whether two views of one storage have elements in common."""
    return _meet(first.rows, second.rows) and _meet(first.cols, second.cols)


def _meet(first: Index, second: Index) -> bool:
    if isinstance(first, range) and isinstance(second, range) and first.step == second.step == 1:
        return max(first.start, second.start) < min(first.stop, second.stop)
    return not set(first).isdisjoint(second)


def transpose(view: View) -> View:
    """`view` with its logical axes exchanged."""
    return View(view.cols, view.rows, not view.transposed, view.col_origin, view.row_origin)


def turned(view: View, matrix: tuple[int, int]) -> View:
    """`view` of the same elements, once every matrix ``(rows, cols)`` of its storage is stored transposed.

    Raises:
        ValueError: it reaches over several matrices, whose rows and columns then lie apart.
    """
    height, width = matrix
    places = view.cols if view.transposed else view.rows
    number = places[0] // height if len(places) else 0
    if len(places) and {min(places) // height, max(places) // height} != {number}:
        raise ValueError("reaches over several matrices")
    inside, beside = -number * height, number * width
    rows, cols = (beside, inside) if view.transposed else (inside, beside)
    return replace(view, rows=_shift(view.rows, rows), cols=_shift(view.cols, cols), transposed=not view.transposed)


def permute(view: View, order: Sequence[int]) -> View:
    """Logical row i is row ``order[i]`` of `view`.

    Raises:
        ValueError: `order` is not a permutation of the rows.
    """
    if sorted(order) != list(range(len(view.rows))):
        raise ValueError("not a permutation of the rows")
    return replace(view, rows=tuple(view.rows[i] for i in order))


def interleaved(heads: int, dim: int) -> tuple[int, ...]:
    """Row order of rotary weights stored as pairs (GGUF llama, Meta) for a logical weight in halves (Hugging Face).

    Logical row ``(head, half, i)`` lies at stored row ``(head, i, half)``, for `heads` heads of `dim` rows each
    (llama.cpp ``LlamaModel.permute``).
    """
    half = dim // 2
    return tuple(h * dim + i * 2 + s for h in range(heads) for s in range(2) for i in range(half))


def take(matrix: Array, rows: Index, cols: Index | None = None) -> Array:
    """``matrix[rows][:, cols]``; shares memory with `matrix` when both are plain ranges."""
    return positions(positions(matrix, 0, rows), 1, cols) if cols is not None else positions(matrix, 0, rows)


def positions(array: Array, axis: int, index: Index) -> Array:
    """`array` at `index` along `axis`; a view for ranges, a copy for permutations."""
    if isinstance(index, range):
        if len(index) == array.shape[axis] and index.start == 0 and index.step == 1:
            return array
        if index.step > 0:
            stop = index[-1] + 1 if len(index) else index.start
            return array[(slice(None),) * axis + (slice(index.start, stop, index.step),)]
    return namespace(array).take(array, array_of(list(index), DType.I64, array), axis=axis)


def _inside(index: Index, start: int, stop: int) -> Index:
    """Positions i with ``start <= index[i] < stop``."""
    if isinstance(index, range) and index.step > 0:
        low = max(0, -(-(start - index.start) // index.step))
        high = min(len(index), -(-(stop - index.start) // index.step))
        return range(low, max(low, high))
    return tuple(i for i, at in enumerate(index) if start <= at < stop)


def _pick(index: Index, chosen: Index) -> Index:
    if isinstance(chosen, range):
        return index[chosen.start : chosen.stop]
    return tuple(index[i] for i in chosen)


def _shift(index: Index, by: int) -> Index:
    if isinstance(index, range):
        return range(index.start + by, index.stop + by, index.step)
    return tuple(i + by for i in index)
