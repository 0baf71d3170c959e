# SPDX-License-Identifier: Apache-2.0
"""What came of one unit of a pass, as a file: what another process measured and factorised.

    "surgery factors", line feed    length of the head, 8 bytes, little-endian    head, JSON    factors, float32

The head has lists in the order of the unit: its tensors' measurements, the digests of BASE's, and the matrices of its targets. Nothing is
called by its name, for both sides know the unit.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import xxhash

from surgery.extraction.factorise import FactorisedMatrix, RowSample, TargetFactors
from surgery.extraction.pairing import Pair
from surgery.extraction.stream.scan import ScanResult
from surgery.extraction.stream.scan_plan import ScanUnit
from surgery.extraction.stream.scratch import ScratchSlot, digest
from surgery.extraction.stream.tally import PairMeasure
from surgery_formats.arrays import empty
from surgery_formats.dtypes import DType
from surgery_formats.errors import ProofError
from surgery_formats.files.bounded_json import parse_object
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.files.raw import File, open_file
from surgery_formats.linalg.survival import Survival
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

__all__ = ["read_unit", "unit_name", "write_unit"]

_MAGIC = b"surgery factors\n"
_BEGIN = len(_MAGIC) + 8  # of the head


def unit_name(number: int) -> str:
    """The file of a unit."""
    return f"unit-{number:06}"


def write_unit(unit: ScanUnit, result: ScanResult, pairs: Mapping[str, Pair], folder: OutputFolder, name: str) -> None:
    """Write what `result` has of a unit; its factors are read one by one. `pairs` is by TUNED's name.

    Raises:
        FitError, ResourceError: as `OutputFolder.create`.
    """
    slots: list[_Placed] = []
    factored = [result.factored.get(target.path) for target in unit.targets]
    head = {
        "measures": [[_told(value) for value in dataclasses.astuple(result.measures[name])] for name in unit.names],
        "digests": [result.digests.known(tensor) if tensor else None for tensor in _bases(unit, pairs)],
        "targets": [one and [_matrix_as_json(matrix, slots) for matrix in one.matrices] for one in factored],
    }
    raw = json.dumps(head, allow_nan=False).encode()
    begin = _MAGIC + len(raw).to_bytes(8, "little") + raw
    file, whole = folder.create(name, len(begin) + _end(slots)), xxhash.xxh3_128(begin)
    file.pwrite(memoryview(begin), 0)
    for at, slot in slots:
        piece = as_bytes(slot.read())
        file.pwrite(piece, len(begin) + at)
        whole.update(piece)
    # with the first hash, a rerun of a killed worker tells that it is whole; with the other, whoever reads it
    file.finish({"xxh3": whole.hexdigest(), "head": xxhash.xxh3_128_hexdigest(raw)})


def read_unit(
    unit: ScanUnit, path: Path, record: Mapping[str, Any], pairs: Mapping[str, Pair], result: ScanResult
) -> None:
    """Add what a file has of a unit to `result`; factors are read when they are needed, and checked then.

    `record` is what the manifest beside the file says about it, and `pairs` is by TUNED's name.

    Raises:
        ProofError: the head is not what was written.
    """
    file = open_file(path)
    size = int.from_bytes(file.read(0, _BEGIN)[len(_MAGIC) :], "little") if file.size >= _BEGIN else 0
    raw = file.read(_BEGIN, size) if _BEGIN + size <= file.size else bytearray()
    if xxhash.xxh3_128_hexdigest(raw) != record.get("head") or record.get("size") != file.size:
        raise _other(path)
    head, source = parse_object(raw, file=path), _UnitFile(file, _BEGIN + size)
    for name, fields in zip(unit.names, head["measures"], strict=True):
        changed, energy, rows, numel, moved, ulp, noise = fields
        result.measures[name] = PairMeasure(changed, float(energy), tuple(rows), numel, moved, float(ulp), float(noise))
    for tensor, known in zip(_bases(unit, pairs), head["digests"], strict=True):
        if tensor is not None and known is not None:
            result.digests.note(tensor, known)
    for target, matrices in zip(unit.targets, head["targets"], strict=True):
        if matrices is not None:
            loaded = tuple(_matrix_of_json(fields, source) for fields in matrices)
            result.factored[target.path] = TargetFactors(target, loaded)


@dataclass(frozen=True, slots=True)
class _UnitFile:
    """The factors of a file; a `SlotReader`."""

    file: File
    begin: int

    def read(self, slot: ScratchSlot) -> numpy.ndarray:
        """The matrix at `slot`, which must be what its process measured."""
        matrix: numpy.ndarray = empty(slot.shape, DType.F32)
        self.file.read_into(as_bytes(matrix), self.begin + slot.offset)
        if digest(matrix) != slot.digest:
            raise _other(self.file.path)
        return matrix


def _other(path: Path) -> ProofError:
    return ProofError("is not what the worker computed", file=path, hint="remove its folder, and run the share again")


def _bases(unit: ScanUnit, pairs: Mapping[str, Pair]) -> Iterator[StoredTensor | None]:
    """BASE's tensor of each of a unit's names, where it is one."""
    for name in unit.names:
        tensor = pairs[name].base.elements
        yield tensor if isinstance(tensor, StoredTensor) else None


def _told(value: Any) -> Any:
    """A number as JSON has it; what is infinite in words, which `float` reads."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


class _Placed(NamedTuple):
    """A matrix, and where it lies behind the head."""

    at: int
    slot: ScratchSlot


def _end(slots: list[_Placed]) -> int:
    """Where what follows the last of `slots` begins."""
    return slots[-1].at + DType.F32.nbytes(math.prod(slots[-1].slot.shape)) if slots else 0


def _matrix_as_json(matrix: FactorisedMatrix, slots: list[_Placed]) -> dict[str, Any]:
    """The figures of a matrix, and where its factors lie behind those in `slots`, to which they are added."""
    sides = []
    for slot in (matrix.left, matrix.right):
        at = _end(slots)
        sides.append([at, *slot.shape, slot.digest])
        slots.append(_Placed(at, slot))
    sample = matrix.sample
    return {
        "sides": sides,
        "values": list(matrix.values),
        "figures": [_told(x) for x in (matrix.total, matrix.rest, matrix.bound, matrix.edge, matrix.fold)],
        "left_energy": matrix.left_energy and list(matrix.left_energy),
        "sample": sample and [_told(x) for x in (sample.along, sample.energy, *sample.survival)],
    }


def _matrix_of_json(fields: Mapping[str, Any], source: _UnitFile) -> FactorisedMatrix:
    left, right = (ScratchSlot(source, at, (rows, cols), known) for at, rows, cols, known in fields["sides"])
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
