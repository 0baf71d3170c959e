# SPDX-License-Identifier: Apache-2.0
"""The tensor that holds the codes of a weight, read and packed a few rows at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage import packing
from surgery_formats.storage.scaled_grid import Numbers
from surgery_formats.storage.small_floats import E2M1, decode_pairs
from surgery_formats.tensors.tensor import StoredTensor

if TYPE_CHECKING:
    import numpy

__all__ = ["CodeRows", "raw_rows"]


@dataclass(frozen=True, slots=True)
class CodeRows:
    """Codes of a matrix.

    Attributes:
        tensor: What holds them.
        shape: ``(rows, columns)`` of the matrix.
        bits: Of a code.
        packed: In whole bytes, as a stream of bits along every row, or two rows of four bits in a row of bytes, the
            first in the low halves.
    """

    tensor: StoredTensor
    shape: tuple[int, int]
    bits: int
    packed: Literal["bytes", "stream", "pairs"] = "bytes"

    def __post_init__(self) -> None:
        rows, columns = self.shape
        words = {"bytes": columns, "stream": packing.words_of(columns, self.bits) * 4, "pairs": columns / 2}
        if rows * words[self.packed] != self.tensor.numel * self.tensor.dtype.bits / 8:
            raise MalformedError(
                f"{self.tensor.dtype.label} {list(self.tensor.shape)} does not hold {rows} x {columns} codes of "
                f"{self.bits} bits",
                file=self.tensor.path,
                tensor=self.tensor.name,
            )

    @property
    def group(self) -> int:
        """Rows that share bytes."""
        return 2 if self.packed == "pairs" else 1

    @property
    def _width(self) -> int:
        """Bytes of a row of the tensor."""
        return self.tensor.numel * self.tensor.dtype.bits // 8 * self.group // self.shape[0]

    def read(self, start: int, stop: int) -> numpy.ndarray:
        """The codes of rows: uint8, or int8 as stored.

        Raises:
            MalformedError: the file ends before, or a byte is none of the codes.
        """
        import numpy as np

        if self.packed == "pairs":
            raw = raw_rows(self.tensor, start // 2, -(-stop // 2), self.shape[0] // 2)
            both = np.stack([raw & 15, raw >> 4], axis=1).reshape(-1, self.shape[1])
            return both[start % 2 : start % 2 + stop - start]
        raw = raw_rows(self.tensor, start, stop, self.shape[0])
        if self.packed == "stream":
            return packing.unpack(raw.view("<i4"), self.bits, self.shape[1])
        if self.tensor.dtype is not DType.I8:
            return raw
        codes, end = raw.view("i1"), 1 << (self.bits - 1)
        if self.bits < 8 and codes.size and not -end <= codes.min() <= codes.max() < end:
            raise MalformedError(
                f"a code of more than {self.bits} bits", file=self.tensor.path, tensor=self.tensor.name
            )
        return codes

    def decode(self, numbers: Numbers, start: int, stop: int, out: numpy.ndarray) -> numpy.ndarray:
        """What the codes of rows stand for, in `out`: contiguous float32."""
        if self.packed == "stream" and numbers is E2M1:
            return decode_pairs(E2M1, raw_rows(self.tensor, start, stop, self.shape[0]), out)
        return numbers.decode(self.read(start, stop), out)

    def packed_rows(self, codes: numpy.ndarray) -> numpy.ndarray:
        """Codes of whole `group`s of rows as they are stored."""
        if self.packed == "pairs":
            pairs: numpy.ndarray = codes[0::2] | (codes[1::2] << 4)
            return pairs
        return packing.pack(codes, self.bits) if self.packed == "stream" else codes

    def offset(self, row: int) -> int:
        """Bytes before a row, a multiple of `group`."""
        return row // self.group * self._width


def raw_rows(tensor: StoredTensor, start: int, stop: int, rows: int) -> numpy.ndarray:
    """The bytes of rows, uint8 ``(stop - start, bytes of a row)``, of a tensor that has `rows` of them.

    Raises:
        MalformedError: the file ends before.
    """
    import numpy as np

    if tensor.strides is not None:  # of a pickle
        return np.ascontiguousarray(tensor.read()).reshape(rows, -1).view(np.uint8)[start:stop]
    width = math.prod(tensor.shape) * tensor.dtype.bits // 8 // rows
    raw = tensor.file.read(tensor.offset + start * width, (stop - start) * width)
    return np.frombuffer(raw, np.uint8).reshape(stop - start, width)
