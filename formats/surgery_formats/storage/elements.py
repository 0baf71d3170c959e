# SPDX-License-Identifier: Apache-2.0
"""Some elements of a stored tensor, counted through all its axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery_formats.tensors.tensor import StoredTensor

if TYPE_CHECKING:
    import numpy

__all__ = ["read_bytes", "read_elements"]


def read_elements(tensor: StoredTensor, first: int, stop: int) -> numpy.ndarray:
    """Elements ``[first, stop)`` of `tensor` in C order, flat, in memory of the caller's own.

    Raises:
        MalformedError: the file ends before.
    """
    import numpy as np

    if tensor.strides is not None:  # of a pickle
        return np.ascontiguousarray(tensor.read()).reshape(-1)[first:stop].copy()
    width = tensor.dtype.bits // 8
    return np.ndarray(
        (stop - first,), tensor.dtype.numpy, tensor.file.read(tensor.offset + first * width, (stop - first) * width)
    )


def read_bytes(tensor: StoredTensor, first: int, stop: int) -> numpy.ndarray:
    """Bytes ``[first, stop)`` of the same, uint8, whatever the type of the elements."""
    import numpy as np

    width = tensor.dtype.bits // 8
    return read_elements(tensor, first // width, -(-stop // width)).view(np.uint8)[first % width :][: stop - first]
