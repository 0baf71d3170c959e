# SPDX-License-Identifier: Apache-2.0
"""Tensors that are computed when they are read: results of adapter algebra, handed to the writers as if they were stored.

A format's writer makes its files from an `Adapter`, whose factors are stored tensors. A `ComputedTensor` has a name, a type and a shape
like a stored one, and its values when asked for, so that every writer serves results as it serves files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery_formats.dtypes import DType
from surgery_formats.files.raw import File
from surgery_formats.tensors.tensor import StoredTensor

if TYPE_CHECKING:
    import torch

__all__ = ["ComputedTensor", "computed"]


@dataclass(frozen=True, slots=True)
class ComputedTensor(StoredTensor):
    """A tensor without bytes of its own.

    Attributes:
        make: Its values, float64, up to a reshape. Called at every read: whoever is expensive remembers what it made.
    """

    make: Callable[[], torch.Tensor] | None = None

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements ``[start:stop]`` of the first axis, in float64: whoever stores them rounds once."""
        assert self.make is not None
        values = self.make().reshape(self.shape)
        return values[start:stop] if self.shape else values


def computed(
    name: str, shape: tuple[int, ...], file: File, make: Callable[[], torch.Tensor], dtype: DType = DType.F32
) -> ComputedTensor:
    """A tensor called `name`, to be stored as `dtype`.

    Args:
        name: Key, for writers that go by it.
        shape: Sizes.
        file: The source to blame in messages.
        make: See `ComputedTensor.make`.
        dtype: Type to store it in.
    """
    numel = 1
    for size in shape:
        numel *= size
    return ComputedTensor(name, dtype, shape, file, 0, numel * dtype.bits // 8, None, make)
