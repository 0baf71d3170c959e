# SPDX-License-Identifier: Apache-2.0
"""Where a weight lies in a graph, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from surgery.onnx.locate.coded_matrix import CodedMatrix
from surgery.onnx.locate.matrix import Matrix
from surgery.onnx.locate.wanted import Wanted
from surgery_formats.tensors.views import Index

__all__ = ["LocatedPiece", "Place", "compact", "count_of", "selector"]

Place = Matrix | CodedMatrix


@dataclass(frozen=True, slots=True)
class LocatedPiece:
    """Some rows of a weight in a matrix of a graph.

    With M the graph's matrix, transposed if `turned`, and W the weight's, transposed if `flipped`:
    ``M[graph_rows] = factor * W[rows]``, each row times its own entry of `row_factors` if there are any. An index is a range
    wherever it can be.

    Attributes:
        weight: The weight.
        place: The graph's matrix.
        turned: Whether the rows are the columns of the graph's matrix.
        flipped: Whether the rows are the columns of the weight's matrix.
        graph_rows: Rows, or columns, of the graph's matrix.
        rows: Rows, or columns, of the weight.
        factor: Constant on the values.
        row_factors: A constant for each row: a batch norm behind a convolution, folded into it.
        fold: Name of the vector of the base that the columns (of W) are multiplied by, or empty.
        fold_plus: What is added to that vector before.
        error: Greatest difference, in steps of the graph's quantiser; 0 where all bits are equal.
        also: Other weights with the same values.
        by_order: Whether nothing but the order of the graph tells it from weights of equal values.
    """

    weight: Wanted
    place: Place
    turned: bool
    flipped: bool
    graph_rows: Index
    rows: Index
    factor: float = 1.0
    row_factors: tuple[float, ...] = ()
    fold: str = ""
    fold_plus: float = 0.0
    error: float = 0.0
    also: tuple[Wanted, ...] = field(default=())
    by_order: bool = False

    @property
    def is_scaled(self) -> bool:
        """Whether the graph has the weight's values times something, and not the values themselves."""
        return bool(self.factor != 1.0 or self.row_factors or self.fold)

    @property
    def how(self) -> str:
        """In words: ``transposed, rows 512 to 1024``."""
        total = self.place.cols if self.turned else self.place.rows
        own = self.weight.cols if self.flipped else self.weight.rows
        words = []
        if self.weight.is_vector:
            words += [] if len(self.graph_rows) == total else [f"elements {_span(self.graph_rows)}"]
        else:
            words.append("transposed" if self.turned != self.flipped else "as it is")
            if len(self.graph_rows) != total:
                words.append(f"{'columns' if self.turned else 'rows'} {_span(self.graph_rows)}")
        if len(self.rows) != own:
            words.append(f"{len(self.rows)} of {own} {'columns' if self.flipped else 'rows'}")
        elif not (isinstance(self.rows, range) and isinstance(self.graph_rows, range)):
            words.append("in another order")
        if isinstance(self.place, CodedMatrix):
            words.append(f"{self.place.label}, within {self.error:.2f} of a step")
        elif self.place.dtype is not self.weight.storage.dtype:
            words.append(f"cast to {self.place.dtype.label}")
        if self.factor != 1.0:
            words.append(f"times {self.factor:.6g}")
        if self.row_factors:
            words.append("each row times a number")
        if self.fold:
            words.append(f"columns times {self.fold}" + (f" + {self.fold_plus:g}" if self.fold_plus else ""))
        if self.by_order:
            words.append("by order alone")
        return ", ".join(words) or "as it is"


def _span(index: Index) -> str:
    return f"{min(index)} to {max(index) + 1}" if len(index) else "none"


def compact(index: Sequence[int]) -> Index:
    """The same positions, as a range if they are one."""
    if len(index) and list(index) == list(range(index[0], index[0] + len(index))):
        return range(index[0], index[0] + len(index))
    return tuple(int(i) for i in index)


def selector(index: Index, start: int = 0) -> slice | list[int]:
    """What selects positions of an axis of which an array has those from `start` on: a slice, which copies nothing, if it can."""
    if isinstance(index, range):
        return slice(index.start - start, index.stop - start)
    return [position - start for position in index]


def count_of(pieces: Sequence[LocatedPiece], total: int) -> int:
    """How many of `total` rows of a weight some pieces hold together, each row once."""
    if any(isinstance(piece.rows, range) and len(piece.rows) == total for piece in pieces):
        return total
    return len({row for piece in pieces for row in piece.rows})
