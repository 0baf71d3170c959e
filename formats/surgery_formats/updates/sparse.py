# SPDX-License-Identifier: Apache-2.0
"""Sparse additions: a few numbers and where they go, added to any block of a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from surgery_formats.arrays import Array, array_of, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight

__all__ = ["SparseAddition", "adding_at", "check_places"]


@dataclass(frozen=True, slots=True)
class SparseAddition:
    """Numbers that are added to single elements of a weight; a kind says how it stores their places.

    Attributes:
        values: ``(n,)``.
        places: Where each goes, as the kind has it; stored, and not trained.
        scale: Factor on the values.
        outputs: Rows of the weight; 0 until `fitted`.
        inputs: Its columns; 0 until `fitted`.
    """

    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None

    values: Factor
    places: Tensor
    scale: float = 1.0
    outputs: int = 0
    inputs: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.outputs, self.inputs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The values', then the places."""
        return (*self.values.tensors, self.places)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """The places."""
        return (self.places,)

    def scaled(self, weight: float) -> Self:
        """The same places, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def fitted(self, fit: Fit) -> Self:
        """The sizes of the weight."""
        return replace(self, outputs=fit.shape[0], inputs=fit.shape[1])

    def factors(self) -> dict[str, Factor]:
        """``values``."""
        return {"values": self.values}

    def low_rank(self) -> None:
        """None: what is sparse has no low rank."""

    def parts(self) -> tuple[tuple[int, Self], ...]:
        """Itself."""
        return ((0, self),)

    def rows_and_columns(self) -> tuple[Array, Array]:
        """The places as rows and columns, ``(n,)`` each, which may lie outside of the weight."""
        raise NotImplementedError

    def prepare(self, weight: Weight) -> Apply:
        """Load the values once.

        Raises:
            FitError: a place is outside of the weight.
        """
        rows, cols = self.rows_and_columns()
        check_places(rows, cols, self.shape, self.places)
        return adding_at(rows, cols, self.values.load(weight.dtype, weight.device) * self.scale)


def check_places(rows: Array, cols: Array, shape: tuple[int, int], stored: Tensor) -> None:
    """Refuse places that a weight does not have.

    Args:
        rows: ``(n,)``.
        cols: As `rows`.
        shape: Of the weight.
        stored: Holds the places.

    Raises:
        FitError: one is outside of the weight.
    """
    if any(len(at) and not (at.min() >= 0 and at.max() < size) for at, size in zip((rows, cols), shape, strict=True)):
        raise FitError(
            f"a place outside of a weight of {list(shape)}",
            file=stored.path,
            tensor=stored.name,
            hint="is this the base it was trained on?",
        )


def adding_at(rows: Array, cols: Array, values: Array) -> Apply:
    """The equation that adds ``values[i]`` to the element ``[rows[i], cols[i]]``; what meets one element is summed.

    Args:
        rows: Whole numbers, ``(n,)``.
        cols: As `rows`.
        values: ``(n,)``, where and in the type in which the arithmetic runs.
    """
    import numpy

    row, col = to_cpu(rows).astype(numpy.int64), to_cpu(cols).astype(numpy.int64)
    order = numpy.lexsort((col, row))
    row, col = row[order], col[order]
    first = numpy.ones(len(row), bool)
    first[1:] = (row[1:] != row[:-1]) | (col[1:] != col[:-1])
    summed = numpy.add.reduceat(to_cpu(values)[order], numpy.flatnonzero(first)) if len(row) else to_cpu(values)
    row, col, summed = row[first], col[first], array_of(summed, DType.of(summed.dtype), values)

    def apply(block: Array, at: Index, beside: Index) -> Array:
        low, high = (int(numpy.searchsorted(row, end)) for end in (min(at), max(at) + 1))
        here, inside = _found(row[low:high], at)
        there, within = _found(col[low:high], beside)
        met = inside & within
        if met.any():
            place = (array_of(here[met], DType.I64, block), array_of(there[met], DType.I64, block))
            block[place] += summed[low:high][array_of(numpy.flatnonzero(met), DType.I64, block)]
        return block

    return apply


def _found(wanted: Array, index: Index) -> tuple[Array, Array]:
    """Where each of `wanted` stands in `index`, and whether it does."""
    import numpy

    if isinstance(index, range) and index.step == 1:
        return wanted - index.start, (wanted >= index.start) & (wanted < index.stop)
    there = numpy.asarray(index, numpy.int64)
    order = numpy.argsort(there)
    at = order[numpy.searchsorted(there, wanted, sorter=order).clip(max=len(there) - 1)]
    return at, there[at] == wanted
