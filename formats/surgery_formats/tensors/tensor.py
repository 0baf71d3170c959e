# SPDX-License-Identifier: Apache-2.0
"""A tensor where it lies on disk. Nothing is read until asked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.files.raw import File

if TYPE_CHECKING:
    import torch

__all__ = ["StoredTensor", "ZeroTensor", "as_bytes"]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where the bytes of one tensor lie.

    Attributes:
        name: Key in its file; untrusted text.
        dtype: Element type.
        shape: Sizes; ``()`` for a scalar.
        file: The open file.
        offset: Absolute position of the first byte.
        nbytes: Length of the byte range. For a contiguous tensor exactly ``numel * bits / 8``.
        strides: In elements, for tensors a pickle stored transposed or expanded; None means C order, contiguous.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: File
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stored_type(self) -> str:
        """Name of what lies on disk, for people."""
        return self.dtype.label

    @property
    def place(self) -> tuple[int, int, int, int]:
        """``(device, inode, offset, nbytes)``: equal for two names of the same bytes (ties)."""
        return (*self.file.identity[:2], self.offset, self.nbytes)

    @property
    def matrix(self) -> tuple[int, int]:
        """``(rows, cols)`` when flattened after the first axis; vectors are one column, scalars one element."""
        if not self.shape:
            return 1, 1
        return self.shape[0], math.prod(self.shape[1:])

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements ``[start:stop]`` of the first axis, in the stored dtype, in memory of the caller's own.

        Returns:
            Shape ``(stop - start, *shape[1:])``; a scalar keeps its shape ``()``.

        Raises:
            MalformedError: the file is shorter than its header says.
            FitError: torch has no such element type.
        """
        import torch

        try:
            dtype = self.dtype.torch
        except TypeError as error:
            raise FitError(
                f"values of type {self.dtype.label} cannot be read", file=self.file.path, tensor=self.name
            ) from error
        if self.strides is not None:
            flat = self._decode(self.file.read(self.offset, self.nbytes), dtype)
            return flat.as_strided(self.shape, self.strides)[start:stop].contiguous()
        if not self.shape:
            return self._decode(self.file.read(self.offset, self.nbytes), dtype).reshape(())
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        rows = max(stop - start, 0)
        if rows * row == 0:
            return torch.empty((rows, *self.shape[1:]), dtype=dtype)
        return self._decode(self.file.read(self.offset + start * row, rows * row), dtype).reshape(rows, *self.shape[1:])

    @staticmethod
    def _decode(raw: bytearray, dtype: torch.dtype) -> torch.Tensor:
        import torch

        return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)


@dataclass(frozen=True, slots=True)
class ZeroTensor(StoredTensor):
    """A tensor that is stored nowhere and holds zeros: what a layer without a bias adds. One element, repeated (strides of 0)."""

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Zeros of the shape asked for."""
        import torch

        found = torch.zeros(self.shape, dtype=self.dtype.torch)
        return found[start:stop] if self.shape else found


def as_bytes(values: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy; writing to them writes to the tensor."""
    import torch

    if not values.numel():
        return memoryview(b"")
    return memoryview(values.reshape(-1).view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]  # numpy has the buffer protocol
