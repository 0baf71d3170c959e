# SPDX-License-Identifier: Apache-2.0
"""Tensors that are computed when read: results of adapter algebra, which writers treat like those of a file; zeros."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from surgery_formats.arrays import Array, namespace
from surgery_formats.dtypes import DType
from surgery_formats.tensors.tensor import StoredTensor, Tensor, matrix_of

__all__ = ["ComputedTensor", "computed", "zeros"]


@dataclass(frozen=True, slots=True)
class ComputedTensor:
    """A tensor without bytes of its own.

    Attributes:
        name: Key, for writers that go by it.
        dtype: Type to store it in.
        shape: Sizes.
        sources: The stored tensors it is computed from.
        make: Its values, of `dtype` or wider, up to a reshape. Called at every read; an expensive one should remember its result.
        stacked: Whether its values are those of `sources`, each behind the one before it.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    sources: tuple[StoredTensor, ...]
    make: Callable[[], Array]
    stacked: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes it takes once it is stored."""
        return self.dtype.nbytes(self.numel)

    @property
    def matrix(self) -> tuple[int, int]:
        """``(rows, cols)``, see `matrix_of`."""
        return matrix_of(self.shape)

    @property
    def path(self) -> Path | None:
        """File of the first source."""
        return self.sources[0].path if self.sources else None

    @property
    def stored_type(self) -> str:
        """Name of the type to store it in."""
        return self.dtype.label

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        """Elements ``[start:stop]`` of the first axis.

        The caller owns the result: `make` may cache its own.
        """
        values = self.make().reshape(self.shape)
        return namespace(values).asarray(values[start:stop] if self.shape else values, copy=True)


def computed(
    name: str,
    shape: tuple[int, ...],
    sources: Iterable[Tensor],
    make: Callable[[], Array],
    dtype: DType = DType.F32,
) -> ComputedTensor:
    """A tensor called `name`, computed from `sources` and to be stored as `dtype`; see `ComputedTensor`."""
    stored = tuple(dict.fromkeys(source for tensor in sources for source in tensor.sources))
    return ComputedTensor(name, dtype, shape, stored, make)


def zeros(name: str, dtype: DType, shape: tuple[int, ...]) -> ComputedTensor:
    """Zeros that are stored nowhere: what a layer without a bias adds."""

    def make() -> Array:
        import numpy

        return numpy.zeros(shape, dtype.numpy)

    return ComputedTensor(name, dtype, shape, (), make)
