# SPDX-License-Identifier: Apache-2.0
"""The inputs that the updates of a weight listen to: the rows of their A, as directions of the stored matrix."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy

from surgery.engine.blocks import row_group
from surgery.engine.plan import Compute
from surgery_formats.arrays import Array, cast
from surgery_formats.binding.operation import Operation
from surgery_formats.dtypes import DType
from surgery_formats.linalg.feedback import leading_inputs
from surgery_formats.tensors.views import positions
from surgery_formats.updates import LoRA, Update, is_directed

__all__ = ["Span", "spans"]

_MOST = 64
"""Directions of a span: sums of more rows are cut to those that the updates do most with."""


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of a stored matrix whose updates listen to the same inputs.

    Attributes:
        start: The first row.
        stop: The row after the last.
        transposed: Whether rows are inputs, and columns outputs.
        directions: Orthonormal ``(r, inputs)``, float64; None where no update says what it listens to.
    """

    start: int
    stop: int
    transposed: bool = False
    directions: Array | None = None


def spans(step: Compute) -> tuple[Span, ...]:
    """All rows of a weight in order, cut where other updates begin; whole groups, see `row_group`."""
    rows, columns = step.target.shape
    touched = [_extent(operation) for operation in step.operations]
    group = row_group(step)
    cuts = {0, rows} | {cut for extent in touched for cut in extent if not cut % group}
    found = []
    for start, stop in itertools.pairwise(sorted(cuts)):
        here = [
            operation
            for operation, (first, last) in zip(step.operations, touched, strict=True)
            if first < stop and start < last
        ]
        found.append(_span(start, stop, columns, here))
    return tuple(found)


def _extent(operation: Operation) -> tuple[int, int]:
    """The first and the last row, plus one, that an operation may change."""
    index = operation.view.cols if operation.view.transposed else operation.view.rows
    return (min(index), max(index) + 1) if len(index) else (0, 0)


def _span(start: int, stop: int, columns: int, operations: list[Operation]) -> Span:
    transposed = any(operation.view.transposed for operation in operations)
    pairs = [_factors(operation, start, stop, columns) for operation in operations]
    known = [pair for pair in pairs if pair is not None]
    if not known or len(known) < len(pairs) or len({operation.view.transposed for operation in operations}) > 1:
        return Span(start, stop, transposed)
    directions = leading_inputs(known, _MOST)
    return Span(start, stop, transposed, directions if len(directions) else None)


def _factors(operation: Operation, start: int, stop: int, columns: int) -> tuple[Array, Array] | None:
    """``(B, A)`` of what an operation adds, A with a column for every input of the span."""
    at = operation.view.locate(start, stop)
    lora = _low_rank(operation.update)
    if lora is None or not at:
        return None
    B = positions(lora.B.load(DType.F32), 0, at.rows) * lora.scale
    A = positions(lora.A.load(DType.F32), 1, at.cols)
    inputs = at.block_rows if at.transposed else at.block_cols
    spread = numpy.zeros((len(A), stop - start if at.transposed else columns), numpy.float32)
    spread[:, list(inputs)] = A
    return cast(B, DType.F32), spread


def _low_rank(update: Update) -> LoRA | None:
    """The low-rank part of an update, if it is one or holds one."""
    lora = update.direction if is_directed(update) else update.low_rank()
    return lora if lora is None or math.isfinite(lora.scale) else None
