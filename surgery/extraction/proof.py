# SPDX-License-Identifier: Apache-2.0
"""The proof of an extraction: an adapter holds what was measured, or is put on BASE and compared with TUNED."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy

from surgery.extraction.extraction_plan import ExtractionPlan
from surgery.extraction.factorise import FactorisedMatrix, TargetFactors
from surgery.extraction.pairing import BLOCK_ELEMENTS, Pair, Strip
from surgery.extraction.stream.lanes import in_threads
from surgery.extraction.stream.scratch import digest
from surgery_formats.arrays import Array, energy
from surgery_formats.binding.bind import Binding
from surgery_formats.binding.edits import Edit, prepared
from surgery_formats.binding.operation import Operation
from surgery_formats.binding.straight import straightened
from surgery_formats.dtypes import DType
from surgery_formats.errors import ProofError
from surgery_formats.storage.aligned import oriented
from surgery_formats.storage.base import read_values
from surgery_formats.tensors.apply import apply_chain
from surgery_formats.updates import Factor

__all__ = ["Residual", "agrees", "prove"]

_ROUNDING = {DType.F32: 2.0**-17, DType.BF16: 2.0**-7, DType.F16: 2.0**-10, DType.F64: 2.0**-17}
"""What storing both factors may add to ``||D - BA|| / ||D||``: measured 2.3e-3 (BF16) and 3e-4 (F16), with room."""
_PROBED = 8  # rows per probe, of three per tensor
_PROBE = 1e-5
"""What float32 may make of a product of the same factors in another order, relative to their norms."""
_AGREEMENT = 0.01  # measured and reported residual, relative


@dataclass(frozen=True, slots=True)
class Residual:
    """What is left of the change of one tensor.

    Attributes:
        energy: ``||TUNED - BASE||_F^2``.
        left: ``||TUNED - (BASE + adapter)||_F^2``.
    """

    energy: float
    left: float

    @property
    def relative(self) -> float:
        """``||TUNED - (BASE + adapter)|| / ||TUNED - BASE||``."""
        return math.sqrt(self.left / self.energy) if self.energy > 0 else (math.inf if self.left else 0.0)


def prove(plan: ExtractionPlan, binding: Binding, *, recognise: bool = True) -> dict[str, Residual]:
    """The residual that an adapter leaves of every change, by TUNED's names.

    Factors that were measured when they were computed must be the same bit by bit, and act on the rows where they were
    measured. Everything else is applied to BASE and compared with TUNED, block by block. Unless `recognise`, factors
    are compared with TUNED as well: codes are not what was measured.

    Raises:
        ProofError: a change is missing, or differs from what was measured.
    """
    edits = {edit.name: edit for edit in binding.edits.values()}
    measures, shifted = plan.scan.measures, {d.name for d in plan.storage.dense_tensors if d.shift is not None}
    measured: dict[str, list[_ProvedPart]] = {}
    reordered = {name for target in plan.storage.targets if target.order for name in target.names}
    for target in plan.storage.targets if recognise else ():
        for name, parts in _parts(plan.factored[target.path]).items():
            measured.setdefault(name, []).extend(parts)
    residuals: dict[str, Residual] = {}
    jobs: list[Callable[[], None]] = []
    for pair in plan.layout.pairs:
        if pair.match != "pair" or not (measures[pair.name].changed or pair.name in shifted):
            continue
        edit = edits.get(pair.name) or edits.get(pair.base.name)
        if pair.name in plan.storage.dropped:
            continue
        if edit is None:
            raise ProofError(
                "changed, but nothing that was written changes it",
                file=binding.adapters[0][0].path.name,
                tensor=pair.name,
            )
        known = None if pair.name in reordered else measured.get(pair.name)
        if known is None or not all(operation.update.low_rank() for operation in edit.operations):
            jobs.append(partial(_measure, residuals, pair, edit))
            continue
        residuals[pair.name] = Residual(measures[pair.name].energy, math.fsum(part.left for part in known))
        jobs.append(partial(_recognise, known, edit, pair))
    in_threads(lambda job: job(), jobs, plan.request.workspace.workers)
    return residuals


@dataclass(frozen=True, slots=True)
class _ProvedPart:
    """The rows of one tensor that a factorised matrix changes.

    Attributes:
        matrix: The factors.
        strip: The rows.
        at: First row of the strip in the stored difference.
        transposed: Whether the stored difference is the transpose of the factors' product.
        turned: Whether the factors that act are those of the transpose: of experts that are held ``(E, in, out)``.
        left: Energy that the factors leave of it.
    """

    matrix: FactorisedMatrix
    strip: Strip
    at: int
    transposed: bool
    turned: bool
    left: float


def _parts(factors: TargetFactors) -> dict[str, list[_ProvedPart]]:
    """The measured parts by tensor; none if the stored factors are not those that were measured."""
    parts: dict[str, list[_ProvedPart]] = {}
    for delta, matrix in zip(factors.target.deltas, factors.matrices, strict=True):
        if matrix.left_energy is None:
            return {}
        at, turns = 0, delta.transposed and factors.target.form == "experts"
        for strip, left in zip(delta.strips, matrix.left_energy, strict=True):
            parts.setdefault(strip.tuned.name, []).append(_ProvedPart(matrix, strip, at, delta.transposed, turns, left))
            at += strip.height
    return parts


def _recognise(parts: list[_ProvedPart], edit: Edit, pair: Pair) -> None:
    """Check that the factors are bit by bit those that were measured, and act on the same rows."""
    parts = sorted(parts, key=lambda part: part.strip.first)
    in_order = sorted(edit.operations, key=_first_row)
    loras = [lora for operation in in_order if (lora := operation.update.low_rank())]
    if edit.replaced is not None or len(loras) != len(parts):
        raise ProofError(
            f"read back as {len(loras)} updates, written as {len(parts)} pairs of factors", tensor=pair.name
        )
    sides: list[list[Array]] = []  # of each part, bit by bit what was measured: left (k, out), right (k, in)
    for lora, part in zip(loras, parts, strict=True):
        sides.append([])
        sources = (lora.A, lora.B) if part.turned else (lora.B, lora.A)
        for factor, slot in zip(
            _directions(*sources, turned=part.turned), (part.matrix.left, part.matrix.right), strict=True
        ):
            stored, padding = numpy.ascontiguousarray(factor[: slot.shape[0]]), factor[slot.shape[0] :]
            if tuple(stored.shape) != slot.shape or digest(stored) != slot.digest or bool(padding.any()):
                raise ProofError("read back, its factors are not those that were measured", tensor=pair.name)
            sides[-1].append(stored)
    source, operations = edit.source, edit.operations
    if parts and parts[0].strip.base.transposed != source.transposed:  # read turned, beside TUNED
        source, operations = straightened(source, operations)
    chain = prepared(operations, source, DType.F32, source.shape[0])
    for part, (left, right) in zip(parts, sides, strict=True):
        row_side, col_side = (right, left) if part.transposed else (left, right)
        height = part.strip.height
        for start in sorted({0, height // 2, max(height - _PROBED, 0)}):
            last = min(start + _PROBED, height)
            rows = row_side[:, part.at + start : part.at + last].T
            expected = rows @ col_side / part.matrix.fold**2
            block = numpy.zeros_like(expected)
            apply_chain(chain, block, part.strip.first + start, part.strip.first + last)
            if (
                math.sqrt(energy(block - expected))
                > _PROBE * math.sqrt(energy(rows) * energy(col_side)) / part.matrix.fold**2
            ):
                raise ProofError(
                    f"read back, rows {part.strip.first + start} to {part.strip.first + last} get another change than "
                    "was measured",
                    tensor=pair.name,
                )


def _first_row(operation: Operation) -> int:
    """The first stored row that an operation changes."""
    rows = operation.view.cols if operation.view.transposed else operation.view.rows
    return min(rows, default=0)


def _directions(left: Factor, right: Factor, *, turned: bool) -> tuple[Array, Array]:
    """Both factors with one direction per row, ``(k, out)`` and ``(k, in)``."""
    first, second = left.load(DType.F32), right.load(DType.F32)
    return (first, second.T) if turned else (first.T, second)


def agrees(measured: float, reported: float, dtype: DType, whole: float = 0.0) -> bool:
    """Whether a residual measured on an adapter is the predicted one.

    `whole` is ``||TUNED|| / ||TUNED - BASE||`` of a DoRA, whose float32 magnitudes and norms multiply whole rows.
    """
    slack = _ROUNDING[dtype] + whole * 2.0**-22
    low, high = (1 - _AGREEMENT) * reported, (1 + _AGREEMENT) * reported
    return max(low - slack, 0.0) <= measured <= math.hypot(high, slack) + 2.0**-20


def _measure(residuals: dict[str, Residual], pair: Pair, edit: Edit) -> None:
    """Apply an edit to BASE and compare the result with TUNED."""
    source = edit.source
    base, tuned = (oriented(side, source) for side in (pair.base, pair.tuned))
    if source.shape != tuned.shape:
        raise ProofError(f"becomes {list(source.shape)} instead of {list(tuned.shape)}", tensor=pair.name)
    # What is added can be compared with the difference itself, in float32: nothing of it is lost beside BASE's larger
    # values.
    added = edit.replaced is None and all(operation.update.low_rank() for operation in edit.operations)
    needs_float64 = not added or DType.F64 in (pair.base.dtype, pair.tuned.dtype)
    exact = DType.F64 if needs_float64 else DType.F32
    step = max(1, BLOCK_ELEMENTS // max(source.shape[1], 1))
    chain = prepared(edit.operations, source, exact, step)  # a DoRA looks at BASE's rows, a LoRA at nothing
    changed = left = 0.0
    for start in range(0, tuned.shape[0], step):
        stop = min(start + step, tuned.shape[0])
        tuned_rows = read_values(tuned, start, stop, exact)
        difference = tuned_rows.copy()
        if start < base.shape[0]:  # of rows that BASE lacks, all is change
            base_rows = read_values(base, start, min(stop, base.shape[0]), exact)
            difference[: len(base_rows)] -= base_rows
        block = numpy.zeros_like(tuned_rows) if added else read_values(source, start, stop, exact)
        apply_chain(chain, block, start, stop)
        changed += _square_sum(difference)
        left += _square_sum((difference if added else tuned_rows) - block)
    residuals[pair.name] = Residual(changed, left)


def _square_sum(block: Array) -> float:
    """The squares rounded to the type of `block` and summed in float64."""
    return float(numpy.sum(block * block, dtype=numpy.float64))
