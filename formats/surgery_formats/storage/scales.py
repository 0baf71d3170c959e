# SPDX-License-Identifier: Apache-2.0
"""Stored tensors with a scale, or a zero, for every block of a weight: read a few rows of blocks at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery_formats.arrays import cast
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage import packing
from surgery_formats.storage.code_rows import raw_rows
from surgery_formats.storage.small_floats import E4M3, E8M0, SmallFloat
from surgery_formats.tensors.tensor import StoredTensor

if TYPE_CHECKING:
    import numpy

__all__ = ["Blocks", "Scales", "Zeros"]

_PLAIN = (DType.F32, DType.BF16, DType.F16)
_CODED = {DType.F8_E4M3: E4M3, DType.F8_E8M0: E8M0, DType.U8: E8M0}  # U8 holds exponents


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a matrix is cut into blocks of rows and columns. No block spans two experts of a stack.

    Attributes:
        shape: Rows and columns of the matrix.
        size: Rows and columns of a block; those at the lower and right ends may have fewer.
        stack: Rows of an expert; all rows where there is one.
    """

    shape: tuple[int, int]
    size: tuple[int, int]
    stack: int

    @property
    def per_expert(self) -> int:
        """Rows of blocks of an expert."""
        return -(-self.stack // self.size[0])

    @property
    def counts(self) -> tuple[int, int]:
        """Rows of blocks, and blocks of a row."""
        return self.shape[0] // self.stack * self.per_expert, -(-self.shape[1] // self.size[1])

    @property
    def group(self) -> int:
        """Rows that whole blocks have, if all do; 1 where blocks are as high as the matrix, or uneven in a stack."""
        high = self.size[0]
        return high if high < self.stack and (self.stack == self.shape[0] or self.stack % high == 0) else 1

    def of_row(self, row: int) -> int:
        """The row of blocks that a row lies in."""
        return row // self.stack * self.per_expert + row % self.stack // self.size[0]

    def first_row(self, block_row: int) -> int:
        """The first row of a row of blocks, also of the one behind the last."""
        expert, inner = divmod(block_row, self.per_expert)
        return expert * self.stack + inner * self.size[0]

    def touched(self, start: int, stop: int) -> range:
        """The rows of blocks that rows lie in."""
        return range(self.of_row(start), self.of_row(stop - 1) + 1)

    def rows(self, start: int, stop: int) -> numpy.ndarray | None:
        """For every row its place among `touched`; None where that is its own, or the only one."""
        import numpy as np

        touched = self.touched(start, stop)
        if len(touched) == 1 or self.size[0] == 1:
            return None
        rows = np.arange(start, stop)
        return rows // self.stack * self.per_expert + rows % self.stack // self.size[0] - touched.start

    def begun(self, start: int, stop: int) -> slice:
        """Those of `touched` that begin in the rows."""
        touched = self.touched(start, stop)
        return slice(int(self.first_row(touched.start) < start), len(touched))

    def are_whole(self, start: int, stop: int) -> bool:
        """Whether the rows are whole rows of blocks."""
        touched = self.touched(start, stop)
        return (self.first_row(touched.start), self.first_row(touched.stop)) == (start, stop)


@dataclass(frozen=True, slots=True)
class Scales:
    """A scale for every block.

    Attributes:
        tensor: The scales, a row for every row of blocks. float32, bfloat16, float16, E4M3, or exponents (E8M0).
        blocks: What they belong to.
        overall: A number that all scales are multiplied by, or one for every expert of a stack.
        divides: They are divided by it instead.
        stored_as: What bytes (U8) stand for, if these are not exponents.
    """

    tensor: StoredTensor
    blocks: Blocks
    overall: StoredTensor | None = None
    divides: bool = False
    stored_as: SmallFloat | None = None

    def __post_init__(self) -> None:
        rows, columns = self.blocks.counts
        if self.tensor.dtype not in (*_PLAIN, *_CODED):
            raise _wrong(self.tensor, f"scales of type {self.tensor.dtype.label}")
        if self.tensor.numel != rows * columns:
            raise _wrong(self.tensor, f"{list(self.tensor.shape)} instead of {rows} x {columns} scales")
        experts = self.blocks.shape[0] // self.blocks.stack
        if self.overall is not None and (self.overall.numel not in (1, experts) or self.overall.dtype not in _PLAIN):
            raise _wrong(self.overall, f"{self.overall.dtype.label} {list(self.overall.shape)} instead of one number")

    @property
    def are_exponents(self) -> bool:
        """Whether only powers of two can be stored."""
        return self._coded is E8M0

    @property
    def _coded(self) -> SmallFloat | None:
        return self.stored_as or _CODED.get(self.tensor.dtype)

    def read(self, block_rows: range) -> numpy.ndarray:
        """As they are stored; of codes, uint8."""
        rows, columns = self.blocks.counts
        raw = raw_rows(self.tensor, block_rows.start, block_rows.stop, rows)
        return raw if self.tensor.dtype in _CODED else raw.view(self.tensor.dtype.numpy).reshape(-1, columns)

    def values(self, stored: numpy.ndarray, block_rows: range) -> numpy.ndarray:
        """float32 of what `read` gives, with the overall number.

        Raises:
            MalformedError: one of them is negative, infinite or no number.
        """
        import numpy as np

        coded = self._coded
        scales: numpy.ndarray = cast(stored, DType.F32) if coded is None else coded.decode(stored)
        self._check(self.tensor, scales)
        overall = self._overall(block_rows)
        if overall is None:
            return scales
        with np.errstate(over="ignore"):
            scales = scales / overall if self.divides else scales * overall
        self._check(self.tensor, scales)
        return scales

    def stored(self, scales: numpy.ndarray, block_rows: range) -> numpy.ndarray:
        """The nearest that can be stored to scales that `values` gives; of exponents, the next power of two above.

        Where a scale is 0, as in a block of zeros, any will do: 1.
        """
        import numpy as np

        if (overall := self._overall(block_rows)) is not None:
            scales = scales * overall if self.divides else scales / overall
        scales = np.where(scales == 0, np.float32(1), scales)
        coded = self._coded
        if coded is None:
            stored: numpy.ndarray = cast(scales, self.tensor.dtype)
            return stored
        if coded is E4M3:
            return E4M3.nearest(np.maximum(scales, np.float32(2.0**-9)))
        fraction, exponent = np.frexp(scales)
        exponents: numpy.ndarray = np.clip(exponent + 127 - (fraction == 0.5), 0, 254).astype(np.uint8)
        return exponents

    def _overall(self, block_rows: range) -> numpy.ndarray | None:
        """Of every row of blocks, as a column."""
        import numpy as np

        if self.overall is None:
            return None
        values = cast(self.overall.read().reshape(-1), DType.F32)
        self._check(self.overall, values)
        if not values.all():
            raise _wrong(self.overall, "the scale of scales is 0")
        experts = np.arange(block_rows.start, block_rows.stop) // self.blocks.per_expert
        column: numpy.ndarray = values[experts if len(values) > 1 else np.zeros_like(experts)][:, None]
        return column

    @staticmethod
    def _check(tensor: StoredTensor, scales: numpy.ndarray) -> None:
        import numpy as np

        low, high = np.min(scales, initial=np.inf), np.max(scales, initial=0)  # NaN if any is
        if not (low >= 0 and high < np.inf):
            raise _wrong(tensor, f"a scale is {low if not low >= 0 else high}")


@dataclass(frozen=True, slots=True)
class Zeros:
    """The number that is subtracted in every block.

    Attributes:
        tensor: The zeros; I8 or E4M3, a row for every row of blocks, or I32 with codes of several rows in a word.
        blocks: What they belong to.
        bits: Of a code, if they are packed; codes are stored with ``2 ** (bits - 1)`` added.
    """

    tensor: StoredTensor
    blocks: Blocks
    bits: int = 0

    def __post_init__(self) -> None:
        rows, columns = self.blocks.counts
        height = packing.words_of(rows, self.bits) if self.bits else rows
        if self.tensor.dtype not in ((DType.I32,) if self.bits else (DType.I8, DType.F8_E4M3)):
            raise _wrong(self.tensor, f"zero points of type {self.tensor.dtype.label}")
        if self.tensor.numel != height * columns:
            raise _wrong(self.tensor, f"{list(self.tensor.shape)} instead of {height} x {columns} zero points")

    @property
    def group(self) -> int:
        """Rows of blocks that fill whole words."""
        return packing.unit(self.bits) if self.bits else 1

    def read(self, block_rows: range) -> numpy.ndarray:
        """As codes, a row for every row of blocks: int8, and uint8 of E4M3 or where packed."""
        rows, columns = self.blocks.counts
        if not self.bits:
            raw = raw_rows(self.tensor, block_rows.start, block_rows.stop, rows)
            return raw.view("i1") if self.tensor.dtype is DType.I8 else raw
        first = block_rows.start // self.group * self.group
        stop = packing.words_of(block_rows.stop, self.bits)
        words = raw_rows(self.tensor, first * self.bits // 32, stop, packing.words_of(rows, self.bits)).view("<i4")
        codes = packing.unpack(words.reshape(-1, columns), self.bits, block_rows.stop - first, axis=0)
        return codes[block_rows.start - first :]

    def values(self, codes: numpy.ndarray) -> numpy.ndarray:
        """float32 of what `read` gives.

        Raises:
            MalformedError: one is no number.
        """
        import numpy as np

        if self.tensor.dtype is DType.F8_E4M3:
            zeros = E4M3.decode(codes)
            if np.isnan(zeros).any():
                raise _wrong(self.tensor, "a zero point is nan")
            return zeros
        zeros = codes.astype(np.float32)
        return zeros - np.float32(1 << (self.bits - 1)) if self.bits else zeros

    def codes(self, zeros: numpy.ndarray) -> numpy.ndarray:
        """The nearest codes to zeros, which are within the range of the weight's codes."""
        import numpy as np

        if self.tensor.dtype is DType.F8_E4M3:
            return E4M3.nearest(zeros)
        rounded = np.rint(zeros)
        codes: numpy.ndarray = (rounded + (1 << (self.bits - 1))).astype("u1") if self.bits else rounded.astype("i1")
        return codes

    def packed(self, codes: numpy.ndarray) -> numpy.ndarray:
        """Codes of rows of blocks, the first a multiple of `group`, as they are stored."""
        import numpy as np

        return packing.pack(codes, self.bits, axis=0) if self.bits else np.ascontiguousarray(codes)

    def offset(self, block_row: int) -> int:
        """Bytes before a row of blocks, a multiple of `group`."""
        return block_row * self.blocks.counts[1] * self.bits // 8 if self.bits else block_row * self.blocks.counts[1]


def _wrong(tensor: StoredTensor, what: str) -> MalformedError:
    return MalformedError(what, file=tensor.path, tensor=tensor.name)
