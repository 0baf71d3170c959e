# SPDX-License-Identifier: Apache-2.0
"""A weight that is stored transposed, and the operations on it, as the model has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from surgery_formats.binding.edits import Operation
from surgery_formats.storage.aligned import turned
from surgery_formats.storage.base import Storage
from surgery_formats.tensors.views import Index, View

__all__ = ["straightened"]


def straightened(source: Storage, operations: Sequence[Operation]) -> tuple[Storage, tuple[Operation, ...]]:
    """The storage with its matrix, or each matrix of its stack, turned, and the same operations on that.

    Args:
        source: Stored transposed.
        operations: On its matrix as it is stored.
    """
    rows, cols = source.shape
    count = source.sizes[0] if len(source.sizes) == 3 else 1
    height = rows // max(count, 1)
    turned_operations = [replace(one, view=_turned(one.view, height, cols)) for one in operations]
    return turned(source), tuple(turned_operations)


def _turned(view: View, height: int, width: int) -> View:
    """A view of one matrix ``(height, width)`` of a stack, on the stack of the turned matrices."""
    down, across = (view.cols, view.rows) if view.transposed else (view.rows, view.cols)
    number = min(down) // height if len(down) else 0
    down, across = _moved(down, -number * height), _moved(across, number * width)
    if view.transposed:  # the logical rows are columns as stored, and rows once turned
        return replace(view, rows=across, cols=down, transposed=False)
    return replace(view, rows=down, cols=across, transposed=True)


def _moved(index: Index, by: int) -> Index:
    if isinstance(index, range):
        return range(index.start + by, index.stop + by, index.step)
    return tuple(position + by for position in index)
