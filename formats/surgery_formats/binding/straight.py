# SPDX-License-Identifier: Apache-2.0
"""A weight whose rows are another's columns, and the operations on it, once it is turned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from surgery_formats.binding.operation import Operation
from surgery_formats.errors import FitError
from surgery_formats.storage import aligned
from surgery_formats.storage.base import Storage
from surgery_formats.tensors.views import turned

__all__ = ["straightened"]


def straightened(source: Storage, operations: Sequence[Operation]) -> tuple[Storage, tuple[Operation, ...]]:
    """The storage with its matrix, or each matrix of its stack, turned, and the same operations on that.

    Args:
        source: Stored the other way round than it will be written.
        operations: On its matrix as it is stored.

    Raises:
        FitError: an operation on several matrices of a stack at once.
    """
    rows, cols = source.shape
    count = source.sizes[0] if len(source.sizes) == 3 else 1
    try:
        moved = [replace(one, view=turned(one.view, (rows // max(count, 1), cols))) for one in operations]
    except ValueError as error:
        raise FitError(f"an update {error}, which {source.kind} stores turned", tensor=source.name) from error
    return aligned.turned(source), tuple(moved)
