# SPDX-License-Identifier: Apache-2.0
"""Element types as safetensors names them.

Headers, plans and inspections need only names and sizes, so neither numpy nor torch is imported until values are read.
"""

from __future__ import annotations

import enum
import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as _numpy
    import torch as _torch

__all__ = ["DType"]


class DType(enum.Enum):
    """An element type: ``(safetensors name, bits, torch name or None if torch lacks the type)``."""

    F64 = ("F64", 64, "float64")
    F32 = ("F32", 32, "float32")
    F16 = ("F16", 16, "float16")
    BF16 = ("BF16", 16, "bfloat16")
    F8_E4M3 = ("F8_E4M3", 8, "float8_e4m3fn")
    F8_E5M2 = ("F8_E5M2", 8, "float8_e5m2")
    F8_E8M0 = ("F8_E8M0", 8, "float8_e8m0fnu")
    F8_E4M3_FNUZ = ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz")
    F8_E5M2_FNUZ = ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz")
    F6_E2M3 = ("F6_E2M3", 6, None)
    F6_E3M2 = ("F6_E3M2", 6, None)
    F4 = ("F4", 4, None)
    I64 = ("I64", 64, "int64")
    I32 = ("I32", 32, "int32")
    I16 = ("I16", 16, "int16")
    I8 = ("I8", 8, "int8")
    U64 = ("U64", 64, "uint64")
    U32 = ("U32", 32, "uint32")
    U16 = ("U16", 16, "uint16")
    U8 = ("U8", 8, "uint8")
    BOOL = ("BOOL", 8, "bool")
    C64 = ("C64", 64, "complex64")

    def __init__(self, label: str, bits: int, torch_name: str | None) -> None:
        self.label = label
        self.bits = bits
        self.torch_name = torch_name

    @property
    def is_float(self) -> bool:
        """Whether arithmetic can use weights of this type directly (plain floating point)."""
        return self in (DType.F64, DType.F32, DType.F16, DType.BF16)

    @property
    def is_float_or_fp8(self) -> bool:
        """Whether values are floating-point numbers: plain ones, or of 8 bits, which are widened before arithmetic."""
        return self.is_float or (self.bits == 8 and self.label.startswith(("F8_E4", "F8_E5")))

    def holds(self, other: DType) -> bool:
        """Whether every number of `other` is one of this type, both of them plain floating point."""
        return self is other or self.bits > other.bits

    def nbytes(self, numel: int) -> int:
        """Return the size of `numel` elements in bytes."""
        return numel * self.bits // 8

    @property
    def torch(self) -> _torch.dtype:
        """The torch type.

        Raises:
            TypeError: torch has no such type (sub-byte floats, or an older torch).
        """
        import torch

        if self.torch_name is None or not hasattr(torch, self.torch_name):
            raise TypeError(f"{self.label} has no torch type")
        dtype: _torch.dtype = getattr(torch, self.torch_name)
        return dtype

    @property
    def numpy(self) -> _numpy.dtype[_numpy.generic]:
        """The numpy type; bfloat16 and float8 are those of ``ml_dtypes``.

        Raises:
            TypeError: numpy has no such type (sub-byte floats, which have no whole number of bytes).
        """
        import numpy

        if self.torch_name is None:
            raise TypeError(f"{self.label} has no numpy type")
        if self.numpy_is_native:
            return numpy.dtype(self.torch_name)
        import ml_dtypes

        scalar: type[_numpy.generic] = getattr(ml_dtypes, self.torch_name)
        return numpy.dtype(scalar)

    @property
    def numpy_is_native(self) -> bool:
        """Whether numpy has this type without ``ml_dtypes``."""
        return self.torch_name is not None and not self.torch_name.startswith(("bfloat", "float8"))

    @classmethod
    def of(cls, dtype: object) -> DType:
        """Return the stored type of a torch or numpy dtype.

        Raises:
            TypeError: safetensors has no such type.
        """
        return _stored_type(dtype)

    @classmethod
    def parse(cls, text: str) -> DType:
        """Parse ``bf16``, ``bfloat16``, ``BF16`` ... into `DType.BF16`.

        Raises:
            ValueError: no such name.
        """
        for member in cls:
            if text.lower() in (
                member.label.lower(),
                member.torch_name,
                (member.torch_name or "").replace("float", "fp"),
            ):
                return member
        raise ValueError(f"unknown dtype '{text}'")


@functools.cache
def _stored_type(dtype: object) -> DType:
    """`DType.of`, which is asked for every block; a name takes numpy twenty microseconds."""
    name = str(dtype).removeprefix("torch.")
    for member in DType:
        if member.torch_name == name:
            return member
    raise TypeError(f"safetensors cannot store {name}")
