# SPDX-License-Identifier: Apache-2.0
"""Tensors stored as codes and scales, read as the float32 values they encode; updates use them like any other tensor.

On disk a factor has two tensors. ``NAME.codes`` is ``(count, length, rank)`` of type I8 for int8. For int4 it is
``(count, bytes)`` of type U8, with the first of two codes in the low half and zero bits where there is no second.
``NAME.scales`` is BF16 ``(count, groups)``. `count` is the number of stacked experts, or 1. The ``length * rank``
numbers of an expert lie row by row, and groups start at the first of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from surgery_formats.arrays import Array, all_finite, cast, namespace
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.linalg.coding import Coding
from surgery_formats.tensors.tensor import StoredTensor, matrix_of

__all__ = ["CodedTensor", "code_shape", "code_type", "pack", "quantised"]

Side = Literal["A", "B"]


def code_type(coding: Coding) -> DType:
    """Of the tensor that holds codes."""
    return DType.I8 if coding.bits == 8 else DType.U8


def code_shape(coding: Coding, count: int, length: int, rank: int) -> tuple[int, ...]:
    """Of the tensor that holds codes."""
    return (count, length, rank) if coding.bits == 8 else (count, -(-length * rank // 2))


def pack(codes: Array, coding: Coding) -> Array:
    """int8 codes ``(count, length, rank)`` as they are stored."""
    if coding.bits == 8:
        return codes
    xp = namespace(codes)
    flat = cast(codes, DType.U8).reshape(len(codes), -1) & 15
    if flat.shape[1] % 2:
        flat = xp.concat([flat, xp.zeros_like(flat[:, :1])], axis=1)
    return flat[:, 0::2] | (flat[:, 1::2] << 4)


def _unpack(stored: Array) -> Array:
    """``(count, bytes)`` to int8 ``(count, 2 * bytes)``."""
    halves = namespace(stored).stack([stored & 15, stored >> 4], axis=-1).reshape(len(stored), -1)
    return (cast(halves, DType.I8) ^ 8) - 8


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A factor, or the factors of stacked experts, as PEFT has them.

    Attributes:
        name: Name of the factor.
        shape: Shape of the factor in PEFT.
        codes: The tensor ``NAME.codes``.
        scales: The tensor ``NAME.scales``.
        coding: How codes are read.
        side: A: ``(count * rank, in)``. B: ``(out, rank * count)``, the expert being the fastest. Both up to a reshape.
        sizes: ``(count, length, rank)``.
    """

    name: str
    shape: tuple[int, ...]
    codes: StoredTensor
    scales: StoredTensor
    coding: Coding
    side: Side
    sizes: tuple[int, int, int]

    @property
    def dtype(self) -> DType:
        """Type of the values that are read."""
        return DType.F32

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def matrix(self) -> tuple[int, int]:
        """``(rows, cols)``, see `matrix_of`."""
        return matrix_of(self.shape)

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """Codes and scales."""
        return self.codes, self.scales

    @property
    def path(self) -> Path:
        """File of the codes."""
        return self.codes.path

    @property
    def stored_type(self) -> str:
        """The type on disk, ``I4`` or ``I8``."""
        return f"I{self.coding.bits}"

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        """Elements ``[start:stop]`` of the first axis, float32.

        Raises:
            MalformedError: a code outside the symmetric range, or bits behind the last code.
            FitError: a scale is NaN or infinite.
        """
        from surgery_formats.linalg.quantise import Codes, dequantise

        codes, scales, coding = self.codes, self.scales, self.coding
        _, length, rank = self.sizes
        values, steps = codes.read(), scales.read()
        if coding.bits == 4:
            values = _unpack(values)
            if bool(values[:, length * rank :].any()):
                raise MalformedError("bits behind its last code", file=codes.path, tensor=codes.name)
            values = values[:, : length * rank]
        if bool((values < -coding.largest).any()):
            raise MalformedError(f"a code below {-coding.largest}", file=codes.path, tensor=codes.name)
        if not all_finite(steps):
            raise FitError("holds NaN or Inf", file=scales.path, tensor=scales.name, hint="convert it again")
        rows = [dequantise(Codes(v.reshape(length, rank), s), coding) for v, s in zip(values, steps, strict=True)]
        xp = namespace(values)
        turned = xp.permute_dims(xp.stack(rows), (0, 2, 1) if self.side == "A" else (1, 2, 0))
        return xp.asarray(turned.reshape(self.shape)[start:stop], copy=True)

    def coded(self) -> tuple[Array, Array]:
        """Codes and scales as stored."""
        return self.codes.read(), self.scales.read()


def quantised(
    name: str,
    codes: StoredTensor,
    scales: StoredTensor,
    coding: Coding,
    side: Side,
    sizes: tuple[int, int, int],
    shape: tuple[int, ...],
) -> CodedTensor:
    """The factor that two stored tensors hold.

    Args:
        name: Name of the factor.
        codes: Its codes.
        scales: Its scales.
        coding: How they are coded.
        side: Whether it is A or B.
        sizes: ``(count, length, rank)``.
        shape: Shape of the factor, see `CodedTensor.side`.

    Raises:
        MalformedError: a stored tensor has the wrong type or shape.
    """
    count, length, rank = sizes
    expected = (
        (codes, code_type(coding), code_shape(coding, *sizes)),
        (scales, DType.BF16, (count, coding.scales(length * rank))),
    )
    for tensor, dtype, expected_shape in expected:
        if tensor.dtype is not dtype or tensor.shape != expected_shape:
            raise MalformedError(
                f"is {tensor.dtype.label} {list(tensor.shape)} instead of {dtype.label} {list(expected_shape)}",
                file=tensor.path,
                tensor=tensor.name,
            )
    return CodedTensor(name, shape, codes, scales, coding, side, sizes)
