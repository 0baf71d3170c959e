# SPDX-License-Identifier: Apache-2.0
"""How far two bases lie apart in the weights that an adapter changes, beside what the adapter adds to them.

A model that was trained as ``(W4 + D) x`` and is served as ``(W16 + D) x`` is off by ``(W4 - W16) x``. How much that is
beside ``D`` is told by their norms; how much of it meets what ``D`` reads and writes, by its parts in the row space of
``D`` (the inputs that the update looks at) and in the column space (the outputs that it moves).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy

from surgery_formats.arrays import Array, cast, to_cpu
from surgery_formats.binding.bind import Binding
from surgery_formats.binding.operation import Operation
from surgery_formats.dtypes import DType
from surgery_formats.linalg.factored import factored_norm
from surgery_formats.storage.aligned import oriented, release
from surgery_formats.storage.base import Storage, read_values
from surgery_formats.tensors.apply import gather
from surgery_formats.tensors.views import positions
from surgery_formats.updates import LoRA

__all__ = ["BaseGap", "base_gap"]

_BLOCK = 1 << 19  # elements that are read at a time
_SAMPLED = 1 << 14  # elements of a weight, where a sample is asked for


@dataclass(frozen=True, slots=True)
class BaseGap:
    """Norms over the weights that low-rank updates change and in which two bases differ.

    Attributes:
        weights: How many they are.
        others: Weights that an adapter changes in a way that has no row and column space, and which are left out.
        base: ``||W||_F`` of the base.
        apart: ``||W' - W||_F`` of the other base's values and its own.
        update: ``||D||_F`` of what the adapter adds.
        rows: Of the part of ``W' - W`` in the row space of ``D``; NaN where only some rows were looked at.
        columns: Of the part in its column space; NaN likewise.
        both: Of the part in both.
        read: Share of the weights' values that were read.
    """

    weights: int
    others: int
    base: float
    apart: float
    update: float
    rows: float
    columns: float
    both: float
    read: float

    @property
    def beside(self) -> float:
        """``||W' - W|| / ||D||``."""
        return self.apart / self.update if self.update else math.inf if self.apart else 0.0


@dataclass(slots=True)
class _GapSums:
    """Squares of norms."""

    base: float = 0.0
    apart: float = 0.0
    update: float = 0.0
    rows: float = 0.0
    columns: float = 0.0
    both: float = 0.0


def base_gap(
    binding: Binding, other: Mapping[tuple[str, str], Storage], *, adapter: int = 0, sampled: bool = False
) -> BaseGap:
    """Measure from the files.

    Args:
        binding: Of the adapters to the base.
        other: The other base's weights, by component and name; those it lacks are taken to be equal.
        adapter: Which of them.
        sampled: Read a few rows of each weight; the parts in row and column space are then not known.

    Raises:
        FitError, MalformedError: a weight cannot be read, or holds what its format does not have.
    """
    sums, count, others, read, numel = _GapSums(), 0, 0, 0, 0
    for key, edit in binding.edits.items():
        theirs = other.get(key)
        operations = [operation for operation in edit.operations if operation.adapter == adapter]
        if theirs is None or edit.added or edit.replaced is not None or not operations:
            continue
        terms = list(_terms(operations))
        if len(terms) < len(operations):
            others += 1
            continue
        count += 1
        numel += math.prod(edit.source.shape)
        read += _measure(sums, edit.source, oriented(theirs, edit.source), terms, sampled=sampled)
    release()
    parts = (sums.rows, sums.columns, sums.both)
    rows, columns, both = (math.nan if sampled else math.sqrt(part) for part in parts)
    base, apart, update = (math.sqrt(part) for part in (sums.base, sums.apart, sums.update))
    return BaseGap(count, others, base, apart, update, rows, columns, both, read / numel if numel else 0.0)


def _terms(operations: Iterable[Operation]) -> Iterable[tuple[Operation, LoRA]]:
    for operation in operations:
        if (lora := operation.update.low_rank()) is not None and operation.share == 1.0:
            yield operation, lora


class _Term:
    """The spaces of one update, and what of a difference lies in them."""

    def __init__(self, operation: Operation, lora: LoRA) -> None:
        self.view = operation.view
        B, A = (numpy.asarray(to_cpu(factor.load(DType.F64))) for factor in (lora.B, lora.A))
        self.norm = abs(lora.scale) * factored_norm(B, A)
        self.U, self.V = _basis(B), _basis(A.T)
        self.reads = numpy.zeros((B.shape[0], self.V.shape[1]))  # (W' - W) V
        self.writes = numpy.zeros((self.U.shape[1], A.shape[1]))  # U^T (W' - W)

    def add(self, apart: Array, start: int, stop: int) -> None:
        at = self.view.locate(start, stop)
        if at:
            part = gather(apart, at)
            rows, cols = numpy.asarray(list(at.rows)), numpy.asarray(list(at.cols))
            self.reads[rows] += part @ positions(self.V, 0, at.cols)
            self.writes[:, cols] += positions(self.U, 0, at.rows).T @ part

    def into(self, sums: _GapSums) -> None:
        sums.rows += _energy(self.reads)
        sums.columns += _energy(self.writes)
        sums.both += _energy(self.U.T @ self.reads)


def _measure(
    sums: _GapSums, base: Storage, other: Storage, terms: Iterable[tuple[Operation, LoRA]], *, sampled: bool
) -> int:
    """Add one weight to the sums; returns how many of its values were read."""
    rows, cols = base.shape
    step = max(1, _BLOCK // max(cols, 1))
    spaces = [_Term(operation, lora) for operation, lora in terms]
    some = max(1, min(rows, _SAMPLED // max(cols, 1))) if sampled else rows
    starts = [rows * number // some for number in range(some)] if sampled else range(0, rows, step)
    own, apart, seen = 0.0, 0.0, 0
    for start in starts:
        stop = min(start + (1 if sampled else step), rows)
        values = cast(read_values(base, start, stop), DType.F64)
        difference = cast(read_values(other, start, stop), DType.F64) - values
        own, apart, seen = own + _energy(values), apart + _energy(difference), seen + stop - start
        for space in () if sampled else spaces:
            space.add(difference, start, stop)
    sums.base += own * rows / seen
    sums.apart += apart * rows / seen
    sums.update += math.fsum(space.norm**2 for space in spaces)
    for space in () if sampled else spaces:
        space.into(sums)
    return seen * cols


def _basis(matrix: Array) -> Array:
    """An orthonormal basis of the columns, without those that rounding alone would give."""
    left, values, _ = numpy.linalg.svd(matrix, full_matrices=False)
    kept: Array = left[:, values > (values[:1].max(initial=0.0) * 1e-7)]
    return kept


def _energy(values: Array) -> float:
    return float(numpy.vdot(values, values))
