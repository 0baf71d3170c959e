# SPDX-License-Identifier: Apache-2.0
"""A toy 4-bit storage: ``X.weight`` as ``X.weight.toy_codes`` (U8, two codes a byte) and ``X.weight.toy_scales`` (F32).

A scale serves a group of columns, of one row or of a band of rows. A code c stands for ``(c - 8) * scale``; the largest value of a
group has the code 1 or 15. Scales have the precision of bfloat16, so that a value that was read is stored as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import PartBytes, StoredPart
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

if TYPE_CHECKING:
    import torch

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

    def read_into(self, block: torch.Tensor, start: int) -> None:
        import torch

        stop = start + len(block)
        packed = self.codes.read(start, stop)
        numbers = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(block.shape).float() - 8
        first, last = start // self.group, -(-stop // self.group)
        steps = self.scales.read(first, last).repeat_interleave(self.group, 0)[start - first * self.group :]
        width = self.shape[1] // self.scales.shape[1]
        block.copy_(numbers * steps[: len(block)].repeat_interleave(width, 1))

    def put(self, start: int, block: torch.Tensor, rounded: torch.Tensor) -> tuple[PartBytes, ...]:
        rows, columns = self.shape
        if start % self.group or (len(block) % self.group and start + len(block) != rows):
            raise ValueError(f"rows {start} to {start + len(block)} are not whole bands of {self.group}")
        codes, scales, values = quantised(block, len(block) // self.group, self.scales.shape[1])
        rounded.copy_(values)
        bands = start // self.group * self.scales.shape[1]
        return (
            PartBytes(0, start * columns // 2, as_bytes(codes)),
            PartBytes(1, bands * DType.F32.bits // 8, as_bytes(scales)),
        )


def quantised(values: torch.Tensor, bands: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and the values they stand for."""
    import torch

    rows, columns = values.shape
    blocks = values.to("cpu", torch.float32).reshape(bands, rows // bands, groups, columns // groups)
    scales = (blocks.abs().amax((1, 3), keepdim=True) / 7).bfloat16().float()
    numbers = (blocks / torch.where(scales > 0, scales, 1.0)).round().clamp(-7, 7)
    raw = (numbers + 8).to(torch.uint8).reshape(rows, columns)
    codes = (raw[:, 0::2] | (raw[:, 1::2] << 4)).contiguous()
    return codes, scales.reshape(bands, groups).contiguous(), (numbers * scales).reshape(rows, columns)


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
