# SPDX-License-Identifier: Apache-2.0
"""What came of one unit of a pass, as a file: what another process measured and factorised.

The head has lists in the order of the unit: its tensors' measurements, the digests of BASE's, and the matrices of its targets, whose
factors are the arrays. Nothing is called by its name, for both sides know the unit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from surgery.engine.shares.piece_file import Payload, PieceFile, open_piece, other_bytes, write_piece
from surgery.extraction.factorise import FactorisedMatrix, RowSample, TargetFactors
from surgery.extraction.pairing import Pair
from surgery.extraction.stream.scan import ScanResult
from surgery.extraction.stream.scan_plan import ScanUnit
from surgery.extraction.stream.scratch import ScratchSlot, digest
from surgery.extraction.stream.tally import PairMeasure
from surgery_formats.arrays import empty
from surgery_formats.dtypes import DType
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.linalg.survival import Survival
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

__all__ = ["read_unit", "unit_name", "write_unit"]


def unit_name(number: int) -> str:
    """The file of a unit."""
    return f"unit-{number:06}"


def write_unit(unit: ScanUnit, result: ScanResult, pairs: Mapping[str, Pair], folder: OutputFolder, name: str) -> None:
    """Write what `result` has of a unit; its factors are read one by one. `pairs` is by TUNED's name.

    Raises:
        FitError, ResourceError: as `OutputFolder.create`.
    """
    slots: list[ScratchSlot] = []
    factored = [result.factored.get(target.path) for target in unit.targets]
    head = {
        "measures": [[_told(value) for value in dataclasses.astuple(result.measures[name])] for name in unit.names],
        "digests": [result.digests.known(tensor) if tensor else None for tensor in _bases(unit, pairs)],
        "targets": [one and [_matrix_as_json(matrix, slots) for matrix in one.matrices] for one in factored],
    }
    write_piece(folder, name, head, [Payload(_nbytes(slot), partial(_bytes, slot)) for slot in slots])


def read_unit(
    unit: ScanUnit, path: Path, record: Mapping[str, Any], pairs: Mapping[str, Pair], result: ScanResult
) -> None:
    """Add what a file has of a unit to `result`; factors are read when they are needed, and checked then.

    `record` is what the manifest beside the file says about it, and `pairs` is by TUNED's name.

    Raises:
        ProofError: the head is not what was written.
    """
    piece = open_piece(path, record)
    head, source = piece.head, _Factors(piece)
    for name, fields in zip(unit.names, head["measures"], strict=True):
        changed, energy, rows, numel, moved, ulp, noise = fields
        result.measures[name] = PairMeasure(changed, float(energy), tuple(rows), numel, moved, float(ulp), float(noise))
    for tensor, known in zip(_bases(unit, pairs), head["digests"], strict=True):
        if tensor is not None and known is not None:
            result.digests.note(tensor, known)
    at = 0
    for target, matrices in zip(unit.targets, head["targets"], strict=True):
        if matrices is not None:
            loaded = []
            for fields in matrices:
                loaded.append(_matrix_of_json(fields, source, at))
                at += _nbytes(loaded[-1].left) + _nbytes(loaded[-1].right)
            result.factored[target.path] = TargetFactors(target, tuple(loaded))


@dataclass(frozen=True, slots=True)
class _Factors:
    """The factors of a unit; a `SlotReader`."""

    piece: PieceFile

    def read(self, slot: ScratchSlot) -> numpy.ndarray:
        """The matrix at `slot`, which must be what its process measured."""
        matrix: numpy.ndarray = empty(slot.shape, DType.F32)
        self.piece.read_into(as_bytes(matrix), slot.offset)
        if digest(matrix) != slot.digest:
            raise other_bytes(self.piece.file.path)
        return matrix


def _bases(unit: ScanUnit, pairs: Mapping[str, Pair]) -> Iterator[StoredTensor | None]:
    """BASE's tensor of each of a unit's names, where it is one."""
    for name in unit.names:
        tensor = pairs[name].base.elements
        yield tensor if isinstance(tensor, StoredTensor) else None


def _told(value: Any) -> Any:
    """A number as JSON has it; what is infinite in words, which `float` reads."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _nbytes(slot: ScratchSlot) -> int:
    return DType.F32.nbytes(math.prod(slot.shape))


def _bytes(slot: ScratchSlot) -> memoryview:
    return as_bytes(slot.read())


def _matrix_as_json(matrix: FactorisedMatrix, slots: list[ScratchSlot]) -> dict[str, Any]:
    """The figures of a matrix, and its factors, which are added to `slots`."""
    sides = []
    for slot in (matrix.left, matrix.right):
        sides.append([*slot.shape, slot.digest])
        slots.append(slot)
    sample = matrix.sample
    return {
        "sides": sides,
        "values": list(matrix.values),
        "figures": [_told(x) for x in (matrix.total, matrix.rest, matrix.bound, matrix.edge, matrix.fold)],
        "left_energy": matrix.left_energy and list(matrix.left_energy),
        "sample": sample and [_told(x) for x in (sample.along, sample.energy, *sample.survival)],
    }


def _matrix_of_json(fields: Mapping[str, Any], source: _Factors, at: int) -> FactorisedMatrix:
    """The matrix whose factors lie at `at`."""
    (rows, cols, known), other = fields["sides"]
    left = ScratchSlot(source, at, (rows, cols), known)
    right = ScratchSlot(source, at + _nbytes(left), (other[0], other[1]), other[2])
    total, rest, bound, edge, fold = map(float, fields["figures"])
    energies, sample = fields["left_energy"], fields["sample"]
    if sample is not None:
        along, energy, *survival = map(float, sample)
    return FactorisedMatrix(
        left,
        right,
        tuple(fields["values"]),
        total,
        rest,
        bound,
        edge,
        fold,
        None if energies is None else tuple(energies),
        None if sample is None else RowSample(along, energy, Survival(*survival)),
    )
