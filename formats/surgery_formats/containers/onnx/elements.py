# SPDX-License-Identifier: Apache-2.0
"""``TensorProto.DataType``: the element types of ONNX, and how raw bytes hold them.

ONNX has types of four and two bits that safetensors lacks. Their elements are packed without regard to rows, the first in
the lowest bits, so a tensor of them is one of bytes with the name of its type (`StoredTensor.packed_as`).
"""

from __future__ import annotations

import math

from surgery_formats.dtypes import DType

__all__ = ["ELEMENT_NAMES", "STRING", "raw_form"]

STRING = 8
_PLAIN = {
    1: DType.F32,
    2: DType.U8,
    3: DType.I8,
    4: DType.U16,
    5: DType.I16,
    6: DType.I32,
    7: DType.I64,
    9: DType.BOOL,
    10: DType.F16,
    11: DType.F64,
    12: DType.U32,
    13: DType.U64,
    14: DType.C64,
    16: DType.BF16,
    17: DType.F8_E4M3,
    18: DType.F8_E4M3_FNUZ,
    19: DType.F8_E5M2,
    20: DType.F8_E5M2_FNUZ,
    24: DType.F8_E8M0,
}
_PACKED = {
    15: ("COMPLEX128", 128),
    21: ("UINT4", 4),
    22: ("INT4", 4),
    23: ("FLOAT4E2M1", 4),
    25: ("UINT2", 2),
    26: ("INT2", 2),
}

ELEMENT_NAMES = {
    **{number: dtype.label for number, dtype in _PLAIN.items()},
    **{number: name for number, (name, _) in _PACKED.items()},
    STRING: "STRING",
}
"""What this project calls each type."""


def raw_form(number: int, shape: tuple[int, ...]) -> tuple[DType, tuple[int, ...], int, str] | None:
    """How raw bytes hold a tensor: element type, shape, bytes and `packed_as`; None for strings and unknown types.

    A packed tensor keeps its axes if its rows are whole bytes; else it is a vector of bytes.
    """
    if (dtype := _PLAIN.get(number)) is not None:
        return dtype, shape, dtype.nbytes(math.prod(shape)), ""
    if number not in _PACKED:
        return None
    name, bits = _PACKED[number]
    nbytes = -(-math.prod(shape) * bits // 8)
    whole = bool(shape) and shape[-1] * bits % 8 == 0
    return DType.U8, (*shape[:-1], shape[-1] * bits // 8) if whole else (nbytes,), nbytes, name
