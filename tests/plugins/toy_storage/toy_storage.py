# SPDX-License-Identifier: Apache-2.0
"""A toy 4-bit storage: ``X.weight`` as ``X.weight.toy_codes`` (U8, two codes a byte) and ``X.weight.toy_scales`` (F32).

A scale serves a group of columns, of one row or of a band of rows. A code c stands for ``(c - 8) * scale``; where scales are chosen,
the largest value of a group has the code 1 or 15. Scales have the precision of bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgery_formats.arrays import Array, cast, to_device
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import PartBytes, StoredPart
from surgery_formats.storage.quantised import Grid, check_rows, put_quantised, read_quantised
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

CODES, SCALES = ".toy_codes", ".toy_scales"


@dataclass(frozen=True, slots=True)
class ToyGrid:
    """``steps (bands, groups)`` of `rows` rows, the first of which is the row `start` of a band of `height`."""

    steps: Array
    width: int
    height: int
    start: int
    rows: int

    def _each(self, columns: int, first: int) -> Array:
        import numpy

        rows = (numpy.arange(self.rows) + self.start) // self.height
        groups = (numpy.arange(columns) + first) // self.width
        return self.steps[rows[:, None], groups]

    def values(self, codes: Array, first: int = 0) -> Array:
        return (cast(codes, DType.F32) - 8) * self._each(codes.shape[1], first)

    def nearest(self, values: Array, first: int = 0) -> Array:
        import numpy

        steps = self._each(values.shape[1], first)
        return cast((values / numpy.where(steps > 0, steps, numpy.float32(1))).round().clip(-8, 7) + 8, DType.U8)


@dataclass(frozen=True, slots=True)
class ToyWeight:
    name: str
    packed: StoredTensor
    scales: StoredTensor

    dtype = DType.F32
    kind = "TOY4"
    elements = None
    is_float = True
    transposed = False
    bits = 4

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.shape

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]

    @property
    def group(self) -> int:
        return self.packed.shape[0] // self.scales.shape[0]

    @property
    def block(self) -> tuple[int, int]:
        return self.group, self.shape[1] // self.scales.shape[1]

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        return self.packed, self.scales

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        return (
            StoredPart(name + CODES, DType.U8, self.packed.shape),
            StoredPart(name + SCALES, DType.F32, self.scales.shape),
        )

    def codes(self, start: int, stop: int) -> Array:
        import numpy

        packed = self.packed.read(start, stop)
        return numpy.stack([packed & 15, packed >> 4], axis=-1).reshape(stop - start, self.shape[1])

    def grid(self, start: int, stop: int) -> ToyGrid:
        first = start // self.group
        steps = self.scales.read(first, -(-stop // self.group))
        return ToyGrid(steps, self.block[1], self.group, start - first * self.group, stop - start)

    def fit(self, start: int, values: Array) -> ToyGrid:
        check_rows(self, start, start + len(values))
        _, steps, _ = quantised(values, len(values) // self.group, self.scales.shape[1])
        return ToyGrid(steps, self.block[1], self.group, 0, len(values))

    def pack(self, start: int, codes: Array, grid: Grid) -> tuple[PartBytes, ...]:
        assert isinstance(grid, ToyGrid)
        check_rows(self, start, start + len(codes))
        bands = start // self.group * self.scales.shape[1]
        return (
            PartBytes(0, start * self.shape[1] // 2, as_bytes(codes[:, 0::2] | (codes[:, 1::2] << 4))),
            PartBytes(1, bands * DType.F32.bits // 8, as_bytes(grid.steps)),
        )

    def read_into(self, block: Array, start: int) -> None:
        read_quantised(self, block, start)

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        return put_quantised(self, start, block, rounded)


def quantised(values: Array, bands: int, groups: int) -> tuple[Array, Array, Array]:
    """Codes, scales, and the values they stand for."""
    import numpy

    rows, columns = values.shape
    blocks = to_device(values, "cpu", DType.F32).reshape(bands, rows // bands, groups, columns // groups)
    scales = cast(cast(abs(blocks).max((1, 3), keepdims=True) / 7, DType.BF16), DType.F32)
    numbers = (blocks / numpy.where(scales > 0, scales, numpy.float32(1))).round().clip(-7, 7)
    raw = cast(numbers + 8, DType.U8).reshape(rows, columns)
    codes = raw[:, 0::2] | (raw[:, 1::2] << 4)
    return codes, scales.reshape(bands, groups), (numbers * scales).reshape(rows, columns)


class ToyStorage:
    name = "toy4"
    title = "X.toy_codes and X.toy_scales: 4 bits a weight, for tests"

    def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[ToyWeight]:
        for name, codes in tensors.items():
            if not name.endswith(CODES):
                continue
            weight = name.removesuffix(CODES)
            scales = tensors.get(weight + SCALES)
            if scales is None:
                raise MalformedError(f"there is no '{weight + SCALES}' beside it", file=codes.path, tensor=name)
            yield _checked(ToyWeight(weight, codes, scales))


def _checked(weight: ToyWeight) -> ToyWeight:
    for tensor, dtype in ((weight.packed, DType.U8), (weight.scales, DType.F32)):
        if tensor.dtype is not dtype or len(tensor.shape) != 2 or 0 in tensor.shape:
            what = f"is {tensor.dtype.label} {list(tensor.shape)}, not a matrix of {dtype.label}"
            raise MalformedError(what, file=tensor.path, tensor=tensor.name)
    if weight.shape[0] % weight.scales.shape[0] or weight.shape[1] % weight.scales.shape[1]:
        raise MalformedError(
            f"its scales do not divide {list(weight.shape)}", file=weight.scales.path, tensor=weight.name
        )
    return weight


TOY4 = ToyStorage()
