# SPDX-License-Identifier: Apache-2.0
"""The types of tensors that GGML knows: their numbers in a GGUF, and the bytes of a block of elements.

Source: ``enum ggml_type`` and ``type_traits`` of ggml (https://github.com/ggml-org/ggml, ``ggml.h``, ``ggml-common.h``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from surgery_formats.dtypes import DType

__all__ = ["BY_NAME", "BY_NUMBER", "GgmlType", "ggml_type_of"]


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A type.

    Attributes:
        name: As llama.cpp calls it.
        number: In a GGUF.
        block: Elements of a block; a row is whole blocks.
        nbytes: Bytes of a block.
        dtype: The element type, of a type whose blocks are single elements; else None.
    """

    name: str
    number: int
    block: int
    nbytes: int
    dtype: DType | None = None

    def shape(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a stored tensor: of elements `sizes`; of blocks bytes, with those of a row on the last axis."""
        return sizes if self.dtype is not None else (*sizes[:-1], sizes[-1] // self.block * self.nbytes)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of a tensor that is stored in `shape`."""
        return shape if self.dtype is not None else (*shape[:-1], shape[-1] // self.nbytes * self.block)

    def size(self, sizes: tuple[int, ...]) -> int:
        """Bytes of a tensor of `sizes`."""
        return math.prod(sizes) // self.block * self.nbytes


_BLOCKS = (
    ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34),
    ("Q8_1", 9, 32, 36), ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176), ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292), ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50), ("IQ4_NL", 20, 32, 18),
    ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136), ("IQ1_M", 29, 256, 56),
    ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66), ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36),
)  # fmt: skip
_ELEMENTS = (
    (DType.F32, 0), (DType.F16, 1), (DType.I8, 24), (DType.I16, 25), (DType.I32, 26), (DType.I64, 27),
    (DType.F64, 28), (DType.BF16, 30),
)  # fmt: skip
_TYPES = (
    *(GgmlType(dtype.label, number, 1, dtype.bits // 8, dtype) for dtype, number in _ELEMENTS),
    *(GgmlType(*block) for block in _BLOCKS),
)

BY_NUMBER: Mapping[int, GgmlType] = MappingProxyType({each.number: each for each in _TYPES})
BY_NAME: Mapping[str, GgmlType] = MappingProxyType({each.name: each for each in _TYPES})


def ggml_type_of(dtype: DType) -> GgmlType | None:
    """The type of elements of `dtype`, or None if GGML has none."""
    return next((each for each in _TYPES if each.dtype is dtype), None)
