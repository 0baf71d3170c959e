# SPDX-License-Identifier: Apache-2.0
"""A weight of HQQ: codes in words, a scale and a zero point for each group.

A value is ``(code - zero) * scale`` (https://github.com/mobiusml/hqq, read from 0.2.8). The weight is first reshaped to
``(-1, group_size)``, with a scale for each row (axis 1), or to ``(group_size, -1)``, with a scale for each column
(axis 0). A word holds codes that lie far apart: its highest bits are of the first rows of that matrix, its lowest of the
last, so that a weight of fewer than 8 bits can only be put as a whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from surgery_formats.arrays import Array, assign, cast
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import PartBytes, StoredPart
from surgery_formats.storage.elements import read_bytes, read_elements
from surgery_formats.storage.flat_blocks import FlatBlocks
from surgery_formats.storage.quantised import Grid, put_quantised, read_quantised
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

if TYPE_CHECKING:
    import numpy

__all__ = ["PACKINGS", "WEIGHT", "HQQGrid", "HQQPacking", "HQQWeight"]

WEIGHT = ".weight"
_ROUNDS = 20  # of HQQ's search, in which deviations to the power of 0.7 count
_POWER, _SHRINK = -0.3, 10.0


class HQQPacking(NamedTuple):
    """How codes lie in words: bits that each takes, codes of a word, and the word's bytes."""

    bits: int
    codes: int
    width: int


PACKINGS = {
    "8bit_u8": HQQPacking(8, 1, 1),
    "4bit_u8": HQQPacking(4, 2, 1),
    "3bit_32": HQQPacking(3, 10, 4),
    "2bit_u8": HQQPacking(2, 4, 1),
    "1bit_u8": HQQPacking(1, 8, 1),
}


@dataclass(frozen=True, slots=True, eq=False)
class HQQGrid:
    """Scales and zero points of some rows.

    Attributes:
        weight: Whose.
        start: First row.
        rows: How many.
        scale: As stored, of the groups of these rows; of all groups where they lie across rows (axis 0).
        zero: The same.
    """

    weight: HQQWeight
    start: int
    rows: int
    scale: numpy.ndarray
    zero: numpy.ndarray

    def values(self, codes: Array, first: int = 0) -> Array:
        """See `Grid`."""
        import numpy as np

        values = np.empty(codes.shape, np.float32)
        assign(values, codes)
        values -= self._spread(self.zero, first, codes.shape[1])
        values *= self._spread(self.scale, first, codes.shape[1])
        return values

    def nearest(self, values: Array, first: int = 0) -> Array:
        """See `Grid`."""
        import numpy as np

        codes = values / self._spread(self.scale, first, values.shape[1])
        codes += self._spread(self.zero, first, values.shape[1])
        return np.rint(codes, out=codes).clip(0, self.weight.largest, out=codes).astype(np.uint8)

    def _spread(self, stored: numpy.ndarray, first: int, width: int) -> numpy.ndarray:
        """A number of each group as one of each element, float32."""
        import numpy as np

        numbers, columns = cast(stored, DType.F32), self.weight.shape[1]
        if self.weight.axis == 1:
            every = np.ones((self.rows, width), np.float32)
            FlatBlocks(self.start, self.rows, columns, self.weight.group_size).multiply(every, numbers, first)
            return every
        if len(numbers) % columns == 0:
            lines = np.arange(self.start, self.start + self.rows) % (len(numbers) // columns)
            return np.take(numbers.reshape(-1, columns)[:, first : first + width], lines, axis=0)
        places = np.arange(self.start, self.start + self.rows)[:, None] * columns + np.arange(first, first + width)
        return np.take(numbers, places % len(numbers))


@dataclass(frozen=True, slots=True)
class HQQWeight:
    """A weight of HQQ.

    Attributes:
        name: In the model's code: ``X.weight``.
        shape: ``(out, in)``.
        axis: Along which the reshaped weight is grouped.
        group_size: Elements that share a scale.
        packing: Of codes in words.
        largest: Code.
        tensor: ``W_q``.
        scale: Of each group.
        zero: The code that stands for 0, a fraction.
        settings: The other tensors.
    """

    name: str
    shape: tuple[int, int]
    axis: int
    group_size: int
    packing: HQQPacking
    largest: int
    tensor: StoredTensor
    scale: StoredTensor
    zero: StoredTensor
    settings: tuple[StoredTensor, ...]

    dtype = DType.F32
    elements = None
    is_float = True
    transposed = False

    @property
    def bits(self) -> int:
        """That a code takes."""
        return self.packing.bits

    @property
    def kind(self) -> str:
        """``HQQ4``."""
        return f"HQQ{self.packing.bits}"

    @property
    def sizes(self) -> tuple[int, ...]:
        """``(out, in)``."""
        return self.shape

    @property
    def group(self) -> int:
        """All rows, unless codes lie one after the other and groups within rows."""
        alone = self.packing.codes == 1 and self.axis == 1 and self.shape[1] % self.group_size == 0
        return 1 if alone else self.shape[0]

    @property
    def block(self) -> tuple[int, int]:
        """Part of a row; for axis 0 elements of one column, at equal distances."""
        return (1, self.group_size) if self.axis == 1 else (self.group_size, 1)

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """Codes, scales, zero points, and the settings."""
        return self.tensor, self.scale, self.zero, *self.settings

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """See `Encoding`."""
        own, stem = self.name.removesuffix(WEIGHT), name.removesuffix(WEIGHT)
        return tuple(
            StoredPart(stem + source.name.removeprefix(own), source.dtype, source.shape) for source in self.sources
        )

    def codes(self, start: int, stop: int) -> Array:
        """See `Quantised`."""
        import numpy as np

        columns, mask = self.shape[1], (1 << self.packing.bits) - 1
        first, end, plane = start * columns, stop * columns, self._plane
        codes = np.empty(end - first, np.uint8)
        for k in range(first // plane, -(-end // plane)):
            low, high = max(first, k * plane), min(end, (k + 1) * plane)
            words = self._words(low - k * plane, high - k * plane) >> self._shift(k)
            codes[low - first : high - first] = words & mask
        if codes.size and int(codes.max()) > self.largest:
            what = f"holds the code {int(codes.max())}, where {self.largest} is the largest"
            raise MalformedError(what, file=self.tensor.path, tensor=self.tensor.name)
        return codes.reshape(stop - start, columns)

    def grid(self, start: int, stop: int) -> HQQGrid:
        """See `Quantised`."""
        import numpy as np

        first, end = self._groups(start, stop)
        scale, zero = (read_elements(tensor, first, end) for tensor in (self.scale, self.zero))
        if not (np.isfinite(cast(scale, DType.F32)) & (cast(scale, DType.F32) > 0)).all():
            raise MalformedError(
                "holds a scale that is no positive number", file=self.scale.path, tensor=self.scale.name
            )
        if not np.isfinite(cast(zero, DType.F32)).all():
            raise MalformedError("holds NaN or infinity", file=self.zero.path, tensor=self.zero.name)
        return HQQGrid(self, start, stop - start, scale, zero)

    def fit(self, start: int, values: Array) -> HQQGrid | None:
        """Scales from the least to the greatest value of each group; the zero points are searched as HQQ does."""
        import numpy as np

        if start % self.group or (self.group > 1 and len(values) != self.shape[0]):
            return None
        grouped = values.reshape((-1, self.group_size) if self.axis == 1 else (self.group_size, -1))
        least, greatest = (each(grouped, axis=self.axis, keepdims=True) for each in (np.min, np.max))
        span, narrow = greatest - least, np.float32(1e-4)
        steps = np.where(span <= narrow, 1, np.float32(self.largest) / np.maximum(span, narrow)).clip(max=2e4)
        steps = steps.astype(np.float32)
        zero = self._searched(grouped, steps, np.rint(-least * steps) if self.bits == 4 else -least * steps)
        scale = cast((1 / steps).reshape(-1), self.scale.dtype)
        return HQQGrid(self, start, len(values), scale, cast(zero.reshape(-1), self.zero.dtype))

    def _searched(self, grouped: numpy.ndarray, steps: numpy.ndarray, zero: numpy.ndarray) -> numpy.ndarray:
        """Zero points for which fewer values are far from their codes (half-quadratic splitting)."""
        import numpy as np

        best = np.float32(np.inf)
        for _ in range(_ROUNDS):
            codes = np.rint(grouped * steps + zero).clip(0, self.largest)
            rest = grouped - (codes - zero) / steps
            error = abs(rest).mean()
            with np.errstate(divide="ignore"):
                rest = np.sign(rest) * np.maximum(abs(rest) - abs(rest) ** np.float32(_POWER) / _SHRINK, 0)
            zero = (codes - (grouped - rest) * steps).mean(axis=self.axis, keepdims=True)
            if error >= best:
                break
            best = error
        return zero

    def pack(self, start: int, codes: Array, grid: Grid) -> tuple[PartBytes, ...]:
        """See `Quantised`; the settings come with the first row."""
        import numpy as np

        assert isinstance(grid, HQQGrid)
        columns, plane, width = self.shape[1], self._plane, self.packing.width
        if self.packing.codes == 1:
            words = np.ascontiguousarray(codes, np.uint8)
        else:
            padded = np.zeros(plane * self.packing.codes, np.uint8)
            padded[: codes.size] = codes.reshape(-1)
            words = np.zeros(plane, np.uint32 if width > 1 else np.uint8)
            for k, each in enumerate(padded.reshape(self.packing.codes, plane)):
                words |= each.astype(words.dtype) << self._shift(k)
        first = self._groups(start, start + grid.rows)[0] * self.scale.dtype.bits // 8
        zero = self._groups(start, start + grid.rows)[0] * self.zero.dtype.bits // 8
        written = [
            PartBytes(0, start * columns if self.packing.codes == 1 else 0, as_bytes(words)),
            PartBytes(1, first, as_bytes(np.ascontiguousarray(grid.scale))),
            PartBytes(2, zero, as_bytes(np.ascontiguousarray(grid.zero))),
        ]
        for part, source in enumerate(self.settings if start == 0 else (), 3):
            written.append(PartBytes(part, 0, as_bytes(source.read())))
        return tuple(written)

    def read_into(self, block: Array, start: int) -> None:
        """See `Storage`."""
        read_quantised(self, block, start)

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """See `Encoding`."""
        return put_quantised(self, start, block, rounded)

    @property
    def words(self) -> int:
        """Of all codes."""
        return self._plane

    @property
    def _plane(self) -> int:
        """Elements between two codes of a word: whole rows of the reshaped weight."""
        count = math.prod(self.shape)
        rows = count // self.group_size if self.axis == 1 else self.group_size
        return -(-rows // self.packing.codes) * (count // rows)

    def _shift(self, k: int) -> int:
        return (self.packing.codes - 1 - k) * self.packing.bits

    def _words(self, first: int, stop: int) -> numpy.ndarray:
        """Words in the order of the first codes they hold; `view_as_float` stores them in another type."""
        width = self.packing.width
        raw = read_bytes(self.tensor, first * width, stop * width)
        return raw.view("<u4") if width > 1 else raw

    def _groups(self, start: int, stop: int) -> tuple[int, int]:
        """The groups of some rows."""
        if self.axis == 0:
            return 0, math.prod(self.shape) // self.group_size
        blocks = FlatBlocks(start, stop - start, self.shape[1], self.group_size)
        return blocks.first, blocks.stop
