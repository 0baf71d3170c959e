# SPDX-License-Identifier: Apache-2.0
"""A toy 4-bit storage: ``X.weight`` as ``X.weight.toy_codes`` (U8, two codes a byte) and ``X.weight.toy_scales`` (F32).

A scale serves a group of columns, of one row or of a band of rows. A code c stands for ``(c - 8) * scale``; the largest value of a
group has the code 1 or 15. Scales have the precision of bfloat16, so that a value that was read is stored as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgery_formats.arrays import Array, cast, to_device
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import PartBytes, StoredPart
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

CODES, SCALES = ".toy_codes", ".toy_scales"


@dataclass(frozen=True, slots=True)
class ToyWeight:
    name: str
    codes: StoredTensor
    scales: StoredTensor

    dtype = DType.F32
    kind = "TOY4"
    elements = None
    is_float = True
    transposed = False

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.shape

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def group(self) -> int:
        return self.codes.shape[0] // self.scales.shape[0]

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        return self.codes, self.scales

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        return (
            StoredPart(name + CODES, DType.U8, self.codes.shape),
            StoredPart(name + SCALES, DType.F32, self.scales.shape),
        )

    def read_into(self, block: Array, start: int) -> None:
        import numpy

        stop = start + len(block)
        packed = self.codes.read(start, stop)
        numbers = cast(numpy.stack([packed & 15, packed >> 4], axis=-1), DType.F32).reshape(block.shape) - 8
        first, last = start // self.group, -(-stop // self.group)
        steps = numpy.repeat(self.scales.read(first, last), self.group, 0)[start - first * self.group :]
        width = self.shape[1] // self.scales.shape[1]
        block[...] = numbers * numpy.repeat(steps[: len(block)], width, 1)

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        rows, columns = self.shape
        if start % self.group or (len(block) % self.group and start + len(block) != rows):
            raise ValueError(f"rows {start} to {start + len(block)} are not whole bands of {self.group}")
        codes, scales, values = quantised(block, len(block) // self.group, self.scales.shape[1])
        rounded[...] = values
        bands = start // self.group * self.scales.shape[1]
        return (
            PartBytes(0, start * columns // 2, as_bytes(codes)),
            PartBytes(1, bands * DType.F32.bits // 8, as_bytes(scales)),
        )


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
    for tensor, dtype in ((weight.codes, DType.U8), (weight.scales, DType.F32)):
        if tensor.dtype is not dtype or len(tensor.shape) != 2 or 0 in tensor.shape:
            what = f"is {tensor.dtype.label} {list(tensor.shape)}, not a matrix of {dtype.label}"
            raise MalformedError(what, file=tensor.path, tensor=tensor.name)
    if weight.shape[0] % weight.scales.shape[0] or weight.shape[1] % weight.scales.shape[1]:
        raise MalformedError(
            f"its scales do not divide {list(weight.shape)}", file=weight.scales.path, tensor=weight.name
        )
    return weight


TOY4 = ToyStorage()
