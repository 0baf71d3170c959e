# SPDX-License-Identifier: Apache-2.0
"""torchao's ``Int4Tensor``: rows of codes in halves of bytes, with scales and zero points that lie across all rows.

A value is ``code * scale + zero_point`` with codes from -8 to 7, the even column in the low half of a byte. Scale and
zero point are ``(groups, rows)``, so that a weight is put as a whole. Read from torchao 0.18 and from FBGEMM's
``int4_row_quantize_zp`` and ``pack_int4``, which define what torchao takes from MSLK.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery_formats.arrays import Array, cast
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import PartBytes, StoredPart
from surgery_formats.storage.elements import read_elements
from surgery_formats.storage.grouped_grid import GroupedGrid
from surgery_formats.storage.quantised import Grid, put_quantised, read_quantised
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

__all__ = ["Int4Weight"]

_SIGN, _LARGEST = 8, 15  # codes are offset by 8, which flips the bit of the sign
_NARROWEST = 1e-6  # of the values of a group, as far as scales go


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """The weight; it satisfies `Quantised`.

    Attributes:
        name: In the model's code.
        shape: ``(out, in)``.
        size: Columns of a group.
        tensor: I8 or U8 ``(out, in / 2)``.
        scale: ``(groups, out)``.
        zero: The number that the code 0 stands for, likewise.
    """

    dtype: ClassVar[DType] = DType.F32
    elements: ClassVar[None] = None
    is_float: ClassVar[bool] = True
    transposed: ClassVar[bool] = False
    kind: ClassVar[str] = "INT4"
    bits: ClassVar[int] = 4

    name: str
    shape: tuple[int, int]
    size: int
    tensor: StoredTensor
    scale: StoredTensor
    zero: StoredTensor

    @property
    def sizes(self) -> tuple[int, ...]:
        """``(out, in)``."""
        return self.shape

    @property
    def group(self) -> int:
        """All rows."""
        return self.shape[0]

    @property
    def block(self) -> tuple[int, int]:
        """Part of a row."""
        return 1, self.size

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """Codes, scales, zero points."""
        return self.tensor, self.scale, self.zero

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """See `Encoding`."""
        (own, last), (stem, _, new) = self.name.rsplit(".", 1), name.rpartition(".")
        endings = (source.name.removeprefix(f"{own}._{last}") for source in self.sources)
        return tuple(
            StoredPart(f"{stem}._{new}{ending}", source.dtype, source.shape)
            for ending, source in zip(endings, self.sources, strict=True)
        )

    def codes(self, start: int, stop: int) -> Array:
        """See `Quantised`; offset, from 0 to 15."""
        import numpy as np

        rows, columns = stop - start, self.shape[1]
        packed = read_elements(self.tensor, start * columns // 2, stop * columns // 2).view(np.uint8)
        codes = np.empty((packed.size, 2), np.uint8)
        np.bitwise_and(packed, _LARGEST, out=codes[:, 0])
        np.right_shift(packed, 4, out=codes[:, 1])
        codes ^= _SIGN
        return codes.reshape(rows, columns)

    def grid(self, start: int, stop: int) -> GroupedGrid:
        """See `Quantised`."""
        scales, biases = (self._columns(tensor, start, stop) for tensor in (self.scale, self.zero))
        if (scales < 0).any():
            raise MalformedError("holds a negative scale", file=self.scale.path, tensor=self.scale.name)
        return self._grid(scales, biases)

    def fit(self, start: int, values: Array) -> GroupedGrid | None:
        """From the least to the greatest value of each group."""
        import numpy as np

        if start or len(values) != self.shape[0]:
            return None
        grouped = values.reshape(len(values), -1, self.size)
        least = grouped.min(axis=2)
        scales = np.maximum(grouped.max(axis=2) - least, np.float32(_NARROWEST)) / np.float32(_LARGEST)
        stored = (cast(scales, self.scale.dtype), cast(least + scales * np.float32(_SIGN), self.zero.dtype))
        return self._grid(*(cast(each, DType.F32) for each in stored))

    def pack(self, start: int, codes: Array, grid: Grid) -> tuple[PartBytes, ...]:
        """See `Quantised`."""
        import numpy as np

        assert isinstance(grid, GroupedGrid)
        stored = np.ascontiguousarray(codes, np.uint8) ^ np.uint8(_SIGN)
        packed = stored[:, 0::2] | (stored[:, 1::2] << 4)
        numbers = zip((grid.scales, grid.biases), (self.scale, self.zero), strict=True)
        across = [cast(np.ascontiguousarray(each.T), tensor.dtype) for each, tensor in numbers]
        return tuple(PartBytes(part, 0, as_bytes(each)) for part, each in enumerate([packed, *across]))

    def read_into(self, block: Array, start: int) -> None:
        """See `Storage`."""
        read_quantised(self, block, start)

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """See `Encoding`."""
        return put_quantised(self, start, block, rounded)

    def _grid(self, scales: Array, biases: Array) -> GroupedGrid:
        import numpy as np

        zeros = np.full_like(scales, _SIGN)
        return GroupedGrid(scales, zeros, biases, self.size, 1, _LARGEST)

    def _columns(self, tensor: StoredTensor, start: int, stop: int) -> Array:
        """float32 ``(rows, groups)`` of some rows: a short range of every group's numbers."""
        import numpy as np

        height, groups = self.shape[0], self.shape[1] // self.size
        spans = [read_elements(tensor, group * height + start, group * height + stop) for group in range(groups)]
        numbers = cast(np.ascontiguousarray(np.stack(spans, axis=1)), DType.F32)
        if not np.isfinite(numbers).all():
            raise MalformedError("holds NaN or infinity", file=tensor.path, tensor=tensor.name)
        return numbers
