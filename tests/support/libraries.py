# SPDX-License-Identifier: Apache-2.0
"""One equation, two libraries: numpy, and torch, whose tensors on the CPU stand in for those on a GPU."""

from __future__ import annotations

import numpy
import pytest
import torch

from surgery_formats.arrays import Array
from surgery_formats.dtypes import DType

__all__ = ["each_library"]


def _numpy(values: numpy.ndarray) -> Array:
    return values


def _torch(values: numpy.ndarray) -> Array:
    dtype, held = DType.of(values.dtype), numpy.ascontiguousarray(values)
    return torch.from_numpy(held.view({8: "u1", 16: "i2", 32: "i4", 64: "i8"}[dtype.bits])).view(dtype.torch)


each_library = pytest.mark.parametrize("of", [_numpy, _torch], ids=["numpy", "torch"])
"""`of` makes an array of the library from one of numpy."""
