# SPDX-License-Identifier: Apache-2.0
"""Weights that a graph stores as codes with scales, as matrices of the numbers that these stand for.

``(code - zero point) * scale``, with one scale and zero point for every tile of the matrix: a block of a row
(MatMulNBits, GatherBlockQuantized), a block of a column, a column, a row or all of it (DequantizeLinear, MatMulInteger).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery_formats.arrays import cast
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

if TYPE_CHECKING:
    import numpy

__all__ = ["CodedMatrix", "PackedCodes", "packed", "unpacked"]

_SLACK = {DType.F32: 2.0**-20, DType.F16: 2.0**-9, DType.BF16: 2.0**-6}
"""What rounding of scales to their type, and of values before they were quantised, may add to an error: a share of them."""
_HALF = 0.5005  # steps: the nearest code, and rounding


@dataclass(frozen=True, slots=True)
class PackedCodes:
    """Integers of a few bits in a tensor, in the order of rows.

    Attributes:
        tensor: Where they lie.
        bits: Of each: 2, 4 or 8.
        signed: Whether they are in two's complement.
        rows: Rows.
        cols: Columns that are stored; a row begins at a whole byte unless `running`.
        running: Whether rows follow each other without regard to bytes, as ONNX packs types of 2 and 4 bits.
    """

    tensor: StoredTensor
    bits: int
    signed: bool
    rows: int
    cols: int
    running: bool = False

    @property
    def least(self) -> int:
        """The smallest code."""
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def most(self) -> int:
        """The greatest code."""
        return (1 << self.bits - 1) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def step(self) -> int:
        """Rows that begin and end at whole bytes together."""
        per = 8 // self.bits
        return per if self.running and self.cols % per else 1

    def read(self, start: int, stop: int) -> numpy.ndarray:
        """Rows ``[start, stop)``, int16."""
        import numpy

        low = start - start % self.step
        high = min(-(-stop // self.step) * self.step, self.rows)
        first, last = self.byte_of(low), self.byte_of(high)
        raw = numpy.frombuffer(self.tensor.file.read(self.tensor.offset + first, last - first), numpy.uint8)
        if self.running:
            codes = unpacked(raw, self.bits)[: (high - low) * self.cols].reshape(high - low, self.cols)
        else:
            codes = unpacked(raw, self.bits).reshape(high - low, -1)[:, : self.cols]
        codes = codes[start - low : stop - low].astype(numpy.int16)
        return numpy.where(codes > self.most, codes - (1 << self.bits), codes) if self.signed else codes

    def byte_of(self, row: int) -> int:
        """Where a row begins."""
        if self.running:
            return -(-row * self.cols * self.bits // 8)
        return row * -(-self.cols * self.bits // 8)

    def encode(self, codes: numpy.ndarray) -> bytes:
        """The bytes of whole rows."""
        import numpy

        codes = (codes & ((1 << self.bits) - 1)).astype(numpy.uint8)
        per = 8 // self.bits
        if self.running:
            flat = codes.reshape(-1)
            return packed(numpy.pad(flat, (0, -len(flat) % per)), self.bits).tobytes()
        return packed(numpy.pad(codes, ((0, 0), (0, -codes.shape[1] % per))).reshape(-1), self.bits).tobytes()


def unpacked(raw: numpy.ndarray, bits: int) -> numpy.ndarray:
    """The codes in bytes, the first in the lowest bits."""
    import numpy

    if bits == 8:
        return raw
    shifts = numpy.arange(0, 8, bits, dtype=numpy.uint8)
    return (raw[:, None] >> shifts & numpy.uint8((1 << bits) - 1)).reshape(-1)


def packed(codes: numpy.ndarray, bits: int) -> numpy.ndarray:
    """Bytes of codes, as many as fill whole bytes."""
    import numpy

    if bits == 8:
        return codes
    shifts = numpy.arange(0, 8, bits, dtype=numpy.uint8)
    joined: numpy.ndarray = numpy.bitwise_or.reduce(codes.reshape(-1, 8 // bits) << shifts, axis=1)
    return joined.astype(numpy.uint8)


@dataclass(frozen=True, eq=False)
class CodedMatrix:
    """A weight stored as codes.

    Attributes:
        name: Of the tensor of codes.
        label: What it is, for people.
        codes: The codes; of more columns than the matrix where blocks are padded.
        cols: Columns.
        tile: Rows and columns that share a scale.
        scales: Where they lie, one for each tile in the order of rows.
        zeros: The zero points, as they are read: integers, or numbers of the scales' type.
        scale_values: float32, by tile.
        zero_values: The same of zero points; None for 0 everywhere.
    """

    name: str
    label: str
    codes: PackedCodes
    cols: int
    tile: tuple[int, int]
    scales: StoredTensor | None
    scale_values: numpy.ndarray
    zero_values: numpy.ndarray | None
    scale_dtype: DType

    @property
    def rows(self) -> int:
        """Of the matrix."""
        return self.codes.rows

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.cols

    @property
    def dtype(self) -> DType:
        """Of its values."""
        return DType.F32

    def spread(self, by_tile: numpy.ndarray, start: int, stop: int) -> numpy.ndarray:
        """What is known by tile, for every element of some rows."""
        import numpy

        height, width = self.tile
        first, last = start // height, -(-stop // height)
        wide = numpy.repeat(by_tile[first:last], width, axis=1)[:, : self.cols]
        return numpy.repeat(wide, height, axis=0)[start - first * height :][: stop - start]

    def block(self, start: int, stop: int) -> numpy.ndarray:
        """Values of rows ``[start, stop)``, float32."""
        import numpy

        codes = self.codes.read(start, stop)[:, : self.cols].astype(numpy.float32)
        if self.zero_values is not None:
            codes -= self.spread(self.zero_values, start, stop)
        codes *= self.spread(self.scale_values, start, stop)
        return codes

    def columns(self, start: int, stop: int) -> numpy.ndarray:
        """Values of some columns."""
        return self.block(0, self.rows)[:, start:stop]

    def points(self, rows: Sequence[int], cols: Sequence[int]) -> numpy.ndarray:
        """Values where some rows and columns meet."""
        import numpy

        return numpy.concatenate([self.block(row, row + 1)[:, cols] for row in rows])

    def slack(self, start: int, stop: int, values: numpy.ndarray) -> numpy.ndarray:
        """How far a value may be from the one that was quantised, for every element of some rows.

        Half a step, of the last code on either side a whole one, because formats of an even number of codes cut one side.
        """
        import numpy

        codes = self.codes.read(start, stop)[:, : self.cols]
        steps = numpy.abs(self.spread(self.scale_values, start, stop))
        ends = (codes == self.codes.least) | (codes == self.codes.most)
        allowed: numpy.ndarray = numpy.where(ends, 0.5 + _HALF, _HALF) * steps
        allowed += numpy.abs(values) * _SLACK[self.scale_dtype]
        return allowed

    def slack_at(self, rows: Sequence[int], cols: Sequence[int], values: numpy.ndarray) -> numpy.ndarray:
        """The same for `points`."""
        import numpy

        width = numpy.zeros((1, self.cols), numpy.float32)
        found = []
        for i, row in enumerate(rows):
            width[0, cols] = values[i]
            found.append(self.slack(row, row + 1, width)[:, cols])
        return numpy.concatenate(found)

    def chosen(self, start: int, values: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """Codes and scales for new values of whole tiles, and the numbers that these stand for.

        Scales and zero points stay, unless a value does not fit: then the scale of its tile grows.
        """
        import numpy

        stop = start + len(values)
        height, width = self.tile
        if start % height or (stop % height and stop != self.rows):
            raise ValueError(f"rows {start} to {stop} are not whole tiles of {height}")
        first, last = start // height, -(-stop // height)
        scales = self.scale_values[first:last].copy()
        zeros = numpy.zeros_like(scales) if self.zero_values is None else self.zero_values[first:last]
        above = numpy.where(scales < 0, zeros - self.codes.least, self.codes.most - zeros) + 0.5
        below = numpy.where(scales < 0, self.codes.most - zeros, zeros - self.codes.least) + 0.5
        high, low = (_by_tile(sign * values, height, width) for sign in (1, -1))
        needed = numpy.maximum(
            numpy.maximum(high, 0) / numpy.maximum(above, 0.5), numpy.maximum(low, 0) / numpy.maximum(below, 0.5)
        )
        grown = needed > numpy.abs(scales)
        if self.scales is None and grown.any():
            raise FitError("its scales have no place in a file where they could be changed", tensor=self.name)
        scales[grown] = numpy.sign(scales[grown] + (scales[grown] == 0)) * needed[grown]
        scales = cast(cast(scales, self.scale_dtype), DType.F32)
        wide_scales = _spread(scales, height, width, values.shape)
        wide_zeros = _spread(zeros, height, width, values.shape)
        safe = numpy.where(wide_scales == 0, 1, wide_scales)
        codes = numpy.clip(numpy.rint(values / safe + wide_zeros), self.codes.least, self.codes.most)
        rounded = (codes - wide_zeros) * wide_scales
        return codes.astype(numpy.int16), scales, rounded.astype(numpy.float32)

    def code_bytes(self, start: int, codes: numpy.ndarray) -> bytes:
        """The bytes of rows of codes; the padding of blocks is what is stored."""
        if codes.shape[1] < self.codes.cols:
            stored = self.codes.read(start, start + len(codes))
            stored[:, : codes.shape[1]] = codes
            codes = stored
        return self.codes.encode(codes)

    def scale_bytes(self, scales: numpy.ndarray) -> bytes:
        """The bytes of scales."""
        return bytes(as_bytes(cast(scales.reshape(-1), self.scale_dtype)))


def _spread(by_tile: numpy.ndarray, height: int, width: int, shape: tuple[int, int]) -> numpy.ndarray:
    import numpy

    return numpy.repeat(numpy.repeat(by_tile, width, axis=1)[:, : shape[1]], height, axis=0)[: shape[0]]


def _by_tile(values: numpy.ndarray, height: int, width: int) -> numpy.ndarray:
    """The greatest value of every tile."""
    import numpy

    rows, cols = values.shape
    padded = numpy.pad(values, ((0, -rows % height), (0, -cols % width)), constant_values=-numpy.inf)
    tiled = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)
    greatest: numpy.ndarray = tiled.max(axis=(1, 3))
    return greatest
