# SPDX-License-Identifier: Apache-2.0
"""Weights for `Update.prepare` (`surgery_formats.updates.Weight`): stored, read in blocks, or held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from surgery_formats.arrays import Array, assign, device_of, dtype_of, empty, namespace
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import Storage
from surgery_formats.tensors.apply import Apply, apply_chain, gather
from surgery_formats.tensors.views import Index, View

__all__ = ["HeldWeight", "WeightView"]


@dataclass(frozen=True, slots=True)
class WeightView:
    """A stored weight as one update of a chain sees it: after the updates before it.

    Attributes:
        storage: The weight on disk.
        earlier: The updates before it, with their views.
        view: Its own.
        dtype: Precision of the arithmetic.
        device: Where it runs.
        height: Storage rows per block.
    """

    storage: Storage
    earlier: tuple[tuple[View, Apply], ...]
    view: View
    dtype: DType
    device: str
    height: int

    @property
    def shape(self) -> tuple[int, int]:
        """Logical size of what the view covers, from the update's own origin."""
        return self.view.row_origin + self.view.shape[0], self.view.col_origin + self.view.shape[1]

    def blocks(self) -> Iterator[tuple[Array, Index, Index]]:
        """Blocks in storage order, each good until the next: fresh memory would cost more than the arithmetic."""
        rows, cols = self.storage.shape
        stored_buffer = empty((min(self.height, rows), cols), self.storage.dtype)
        buffer = empty(stored_buffer.shape, self.dtype, self.device)
        for start in range(0, rows, self.height):
            end = min(start + self.height, rows)
            at = self.view.locate(start, end)
            if at:
                stored, block = stored_buffer[: end - start], buffer[: end - start]
                self.storage.read_into(stored, start)
                assign(block, stored)
                apply_chain(self.earlier, block, start, end)
                yield gather(block, at), at.rows, at.cols


@dataclass(frozen=True, slots=True, eq=False)
class HeldWeight:
    """A weight in memory.

    Attributes:
        values: Logical ``(out, in)``; never written to.
    """

    values: Array

    @classmethod
    def zeros(cls, shape: tuple[int, int], dtype: DType) -> HeldWeight:
        """A weight of zeros that takes the memory of one element: a linear update turns it into the update's delta."""
        import numpy

        return cls(numpy.broadcast_to(numpy.zeros((1, 1), dtype.numpy), shape))

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def dtype(self) -> DType:
        """Precision of the arithmetic: the values'."""
        return dtype_of(self.values)

    @property
    def device(self) -> str:
        """Where the values are."""
        return device_of(self.values)

    def blocks(self) -> Iterator[tuple[Array, Index, Index]]:
        """All of it at once, copied."""
        yield namespace(self.values).asarray(self.values, copy=True), range(self.shape[0]), range(self.shape[1])
