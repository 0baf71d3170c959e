# SPDX-License-Identifier: Apache-2.0
"""New bytes of a graph's tensor: every weight in it is computed as a merge of its checkpoint does, and put in its place.

A weight is computed row by row, whatever way it lies in the graph. A tensor is made in memory, of one that is too large
for that a strip of rows at a time; one whose weights lie row below row is written as it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy
import xxhash

from surgery.engine.arithmetic import check_finite, compute
from surgery.engine.jobs import Write
from surgery.engine.ledger import CodeChange, Measurement
from surgery.engine.plan import Compute
from surgery.onnx.locate.aspect import bits, rounded_bits
from surgery.onnx.locate.coded_matrix import CodedMatrix
from surgery.onnx.locate.compare import is_there
from surgery.onnx.locate.matrix import Matrix
from surgery.onnx.locate.pieces import LocatedPiece
from surgery.onnx.locate.turning import held
from surgery.onnx.merge.changes import Change, TensorChange
from surgery.onnx.merge.coded_weight import CodedWeight
from surgery.onnx.merge.scatter import Scatter, not_the_base, same_bits
from surgery_formats.arrays import cast
from surgery_formats.dtypes import DType
from surgery_formats.linalg.survival import Survival
from surgery_formats.storage.plain import Elements
from surgery_formats.tensors.tensor import as_bytes

__all__ = ["rewrite"]

_STRIP = 1 << 26  # bytes of a tensor that are made in memory
_CODED = 1 << 24  # numbers of a tensor of codes
_CHUNK = 4 << 20  # bytes that are written, and read back, at once
_EVERY = 8  # rows of a tensor of codes that are measured

Stop = Callable[[], bool]
Rows = Callable[[int, numpy.ndarray], None]
"""Takes rows of an updated weight: the first, and their values."""


def rewrite(label: str, change: TensorChange, write: Write, stop: Stop, device: str = "cpu") -> tuple[Measurement, ...]:
    """Compute a tensor and hand its bytes to `write` in order; see `surgery.engine.arithmetic.compute`.

    What the graph should hold bit for bit is compared with the base, element by element, as both are read.

    Raises:
        FitError: a value is NaN or Inf, or too large for the tensor's type.
        ProofError: from `write`.
    """
    for one in change.changes:
        compared = one.piece.is_scaled or _is_plain(one)
        if isinstance(one.piece.place, Matrix) and not compared and not is_there(one.piece):
            raise not_the_base(one.piece)
    if isinstance(change.place, CodedMatrix):
        return _codes(label, change, change.place, write, stop, device)
    return (_numbers(label, change, change.place, write, stop, device),)


class _Sink:
    """Writes in order, and hashes what it writes."""

    def __init__(self, part: int, write: Write) -> None:
        self._part, self._write = part, write
        self._hash = xxhash.xxh3_128()

    def put(self, at: int, data: memoryview) -> None:
        """Bytes from `at` on, a piece at a time."""
        for start in range(0, len(data), _CHUNK):
            chunk = data[start : start + _CHUNK]
            self._hash.update(chunk)
            self._write(self._part, at + start, chunk)

    @property
    def digest(self) -> str:
        """Of everything."""
        return self._hash.hexdigest()


class _TensorTally:
    """What was measured of the weights of a tensor, together."""

    def __init__(self) -> None:
        self.changed = False
        self.sampled = self.moved = 0
        self.kept = Survival()

    def add(self, one: Measurement) -> None:
        """Another weight of it."""
        self.changed |= one.changed
        self.sampled += one.sampled
        self.moved += one.moved
        self.kept = Survival.total((self.kept, one.kept))

    def result(self, digest: str) -> Measurement:
        """All together."""
        return Measurement(digest, self.changed, self.sampled, self.moved, *self.kept)


def _updated(
    label: str, change: Change, dtype: DType, take: Rows, stop: Stop, device: str, seen: Rows | None = None
) -> Measurement:
    """Compute a weight as a merge of the checkpoint does, and hand its rows to `take`, as the graph has their values.

    `seen` gets the rows of the base as they are read.
    """
    edit, piece = change.edit, change.piece
    source = edit.source
    by_row = numpy.array(piece.row_factors)[:, None] * piece.factor if piece.row_factors else None
    exact = DType.F32 if piece.is_scaled and dtype is not DType.F64 else dtype
    cols = source.shape[1]
    fold = None
    if change.fold is not None:
        fold = change.fold.block(0, change.fold.rows).reshape(-1).astype(numpy.float64) + piece.fold_plus

    def note(part: int, offset: int, raw: memoryview) -> None:
        values = numpy.ndarray((len(raw) * 8 // exact.bits // cols, cols), exact.numpy, raw)
        first = offset * 8 // (exact.bits * cols)
        if piece.is_scaled:
            values = values * (piece.factor if by_row is None else by_row[first : first + len(values)])
            values = values if fold is None else values * fold
            check_finite(values, dtype, label)
            values = cast(values, dtype)
        take(first, values)

    step = Compute(source, edit.operations, Elements(source.sizes, source.shape, exact))
    done = compute(label, step, note, stop, device, seen=seen)[0]
    return replace(done, changed=True) if edit.replaced is not None else done  # it is no change of what replaces


def _numbers(label: str, change: TensorChange, place: Matrix, write: Write, stop: Stop, device: str) -> Measurement:
    assert place.tensor is not None
    tensor = place.tensor
    sink, measured = _Sink(0, write), _TensorTally()
    whole = Matrix(place.name, tensor, place.dtype, 0, tensor.numel // place.cols, place.cols)
    width = place.dtype.nbytes(place.cols)
    ordered = sorted(change.changes, key=lambda one: _first_row(one.piece))
    if tensor.nbytes > _STRIP and all(_straight(one.piece) for one in ordered):
        at = 0
        for one in ordered:
            first = _first_row(one.piece)
            _copy(whole, at, first, sink)
            done = _updated(
                label,
                one,
                place.dtype,
                _rows_put(sink, first, width),
                stop,
                device,
                _rows_check(whole, first, one) if _is_plain(one) else None,
            )
            measured.add(done)
            at = first + len(one.piece.graph_rows)
        _copy(whole, at, whole.rows, sink)
        return measured.result(sink.digest)
    height = max(1, _STRIP // max(width, 1))
    for start in range(0, whole.rows, height):
        stop_row = min(start + height, whole.rows)
        strip = held("strip", (stop_row - start) * width).view(place.dtype.numpy).reshape(-1, place.cols)
        tensor.file.read_into(as_bytes(strip), tensor.offset + start * width)
        for one in ordered:
            put = Scatter(strip, start, one.piece)
            done = _updated(label, one, place.dtype, put.rows, stop, device, put.check if _is_plain(one) else None)
            if not start:  # each pass measures the same
                measured.add(done)
        sink.put(start * width, as_bytes(strip))
    return measured.result(sink.digest)


def _is_plain(change: Change) -> bool:
    """Whether the graph should hold the base's values bit for bit, and they are read here."""
    piece = change.piece
    return not piece.is_scaled and not piece.flipped and change.edit.replaced is None


def _rows_put(sink: _Sink, first: int, width: int) -> Rows:
    """Writes rows of `width` bytes that lie one below the other, from row `first` of the tensor on."""

    def put(row: int, values: numpy.ndarray) -> None:
        sink.put((first + row) * width, as_bytes(values))

    return put


def _rows_check(whole: Matrix, first: int, change: Change) -> Rows:
    """A check of rows that lie one below the other."""

    def check(row: int, values: numpy.ndarray) -> None:
        there = whole.block(first + row, first + row + len(values))
        if not same_bits(rounded_bits(values, whole.dtype), bits(there, whole.dtype), whole.dtype):
            raise not_the_base(change.piece)

    return check


def _first_row(piece: LocatedPiece) -> int:
    """The row of the tensor, counted in its matrix's columns, where a piece begins."""
    place = piece.place
    assert isinstance(place, Matrix)
    return place.start // place.cols + (0 if piece.turned else min(piece.graph_rows))


def _straight(piece: LocatedPiece) -> bool:
    """Whether all of a weight lies row below row."""
    return (
        not piece.turned
        and not piece.flipped
        and isinstance(piece.graph_rows, range)
        and piece.rows == range(piece.weight.rows)
    )


def _copy(whole: Matrix, start: int, stop: int, sink: _Sink) -> None:
    """Rows that stay."""
    height = max(1, _CHUNK // max(whole.dtype.nbytes(whole.cols), 1))
    for at in range(start, stop, height):
        rows = whole.block(at, min(at + height, stop))
        sink.put(whole.dtype.nbytes(at * whole.cols), as_bytes(rows))


def _codes(
    label: str, change: TensorChange, place: CodedMatrix, write: Write, stop: Stop, device: str
) -> tuple[Measurement, ...]:
    """A tensor of codes: rows that no update touches keep theirs."""
    weight = CodedWeight(place)
    sinks = [_Sink(part, write) for part in range(len(weight.sources))]
    kept = Survival()
    codes = moved = sampled = 0
    changed = grown = False
    for start, end in _strips(weight):
        before = place.block(start, end)
        values, base = before.copy(), before.copy()
        for one in change.changes:
            _updated(label, one, DType.F32, Scatter(values, start, one.piece).rows, stop, device)
            _scatter_base(one, Scatter(base, start, one.piece))
        check_finite(values, place.scale_dtype, label)
        new, scales, rounded = place.chosen(start, values)
        old = place.codes.read(start, end)[:, : place.cols]
        same_scales = place.spread(place.scale_values, start, end) == place.spread_tiles(scales, 0, len(values))
        kept_codes = ((values == before) & (rounded == before)) | ((values == base) & same_scales)  # whoever chose them
        new, rounded = numpy.where(kept_codes, old, new), numpy.where(kept_codes, before, rounded)
        sinks[0].put(place.codes.byte_of(start), memoryview(place.code_bytes(start, new)))
        if len(sinks) > 1:
            first = start // place.tile[0] * place.scale_values.shape[1]
            sinks[1].put(place.scale_dtype.nbytes(first), memoryview(place.scale_bytes(scales)))
        grown |= bool((scales != place.scale_values[start // place.tile[0] :][: len(scales)]).any())
        changed |= bool((rounded != before).any())
        rows = numpy.flatnonzero((values != before).any(axis=1))[::_EVERY]
        codes += rows.size * place.cols
        moved += int((new[rows] != old[rows]).sum())
        sampled += rows.size * place.cols
        wanted, stored = (values[rows] - base[rows], rounded[rows] - before[rows])
        kept = Survival.total((kept, Survival.of(wanted.astype("f8"), stored.astype("f8"))))
    tally = CodeChange(codes, moved, "nearest", "fresh" if grown else "kept")
    whole = Measurement(sinks[0].digest, changed, sampled, moved, *kept, tally)
    return whole, *(Measurement(sink.digest, changed) for sink in sinks[1:])


def _strips(weight: CodedWeight) -> Iterator[tuple[int, int]]:
    rows, cols = weight.shape
    height = max(1, _CODED // max(cols, 1) // weight.group) * weight.group
    for start in range(0, rows, height):
        yield start, min(start + height, rows)


def _scatter_base(change: Change, put: Scatter) -> None:
    """The values of the base itself, as the graph should have had them."""
    piece = change.piece
    fold = None if change.fold is None else change.fold.block(0, change.fold.rows).reshape(-1) + piece.fold_plus
    height = max(1, _CHUNK // 4 // max(piece.weight.cols, 1))
    for start in range(0, piece.weight.rows, height):
        block = piece.weight.block(start, min(start + height, piece.weight.rows)).astype(numpy.float32) * piece.factor
        if piece.row_factors:
            block *= numpy.array(piece.row_factors[start : start + len(block)], numpy.float32)[:, None]
        put.rows(start, block if fold is None else block * fold)
