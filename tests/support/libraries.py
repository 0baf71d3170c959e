# SPDX-License-Identifier: Apache-2.0
"""One equation, two libraries: numpy, and torch, whose tensors on the CPU stand in for those on a GPU."""

from __future__ import annotations

import numpy
import pytest

from surgery_formats.arrays import Array, as_torch

__all__ = ["each_library"]


def _numpy(values: numpy.ndarray) -> Array:
    return values


def _torch(values: numpy.ndarray) -> Array:
    return as_torch(numpy.ascontiguousarray(values))


each_library = pytest.mark.parametrize("of", [_numpy, _torch], ids=["numpy", "torch"])
"""`of` makes an array of the library from one of numpy."""
