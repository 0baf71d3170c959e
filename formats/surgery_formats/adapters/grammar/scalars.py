# SPDX-License-Identifier: Apache-2.0
"""Numbers that stand in small tensors: alphas, switches, shapes. They are read without torch."""

from __future__ import annotations

import struct

from surgery_formats.adapters.grammar.module import malformed
from surgery_formats.dtypes import DType
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["scalar", "whole_numbers"]

_FORMATS = {DType.F16: "<e", DType.F32: "<f", DType.F64: "<d"}  # bfloat16 is the upper half of a float32
_MOST_NUMBERS = 8  # no weight has more axes
_WHOLE = (DType.I64, DType.I32, DType.I16, DType.I8, DType.U8, DType.BOOL)


def scalar(tensor: StoredTensor, what: str = "an alpha") -> float:
    """The number in a tensor of one element.

    Raises:
        MalformedError: more elements, or another type.
    """
    if tensor.numel != 1 or tensor.dtype not in (*_FORMATS, DType.BF16, *_WHOLE):
        raise malformed(tensor, f"{what} of shape {list(tensor.shape)}, {tensor.dtype.label}")
    raw = bytes(tensor.file.read(tensor.offset, tensor.dtype.bits // 8))
    if tensor.dtype in _WHOLE:
        return float(int.from_bytes(raw, "little", signed=tensor.dtype not in (DType.U8, DType.BOOL)))
    if tensor.dtype is DType.BF16:
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    return float(struct.unpack(_FORMATS[tensor.dtype], raw)[0])


def whole_numbers(tensor: StoredTensor, what: str) -> tuple[int, ...]:
    """The numbers in a short vector of integers, which are greater than 0.

    Raises:
        MalformedError: other numbers, or another tensor.
    """
    size = tensor.dtype.bits // 8
    if tensor.dtype not in (DType.I64, DType.I32) or len(tensor.shape) != 1 or not 0 < tensor.numel <= _MOST_NUMBERS:
        raise malformed(tensor, f"{what} in a tensor of shape {list(tensor.shape)}, {tensor.dtype.label}")
    raw = bytes(tensor.file.read(tensor.offset, tensor.nbytes))
    numbers = tuple(int.from_bytes(raw[at : at + size], "little", signed=True) for at in range(0, len(raw), size))
    if min(numbers) < 1:
        raise malformed(tensor, f"{what} of {list(numbers)}")
    return numbers
