# SPDX-License-Identifier: Apache-2.0
"""Weights that are read with their axes exchanged, so that their blocks are those of what is written."""

from __future__ import annotations

from dataclasses import replace

from surgery_formats.binding.edits import Operation
from surgery_formats.errors import FitError
from surgery_formats.storage.aligned import turned
from surgery_formats.storage.base import Encoding, Storage
from surgery_formats.tensors import views

__all__ = ["is_transposed", "turned_step"]


def is_transposed(encoding: Encoding) -> bool:
    """Whether a weight is written with its axes exchanged, see `Storage.transposed`; elements alone never are."""
    return bool(getattr(encoding, "transposed", False))


def turned_step(source: Storage, operations: tuple[Operation, ...]) -> tuple[Storage, tuple[Operation, ...]]:
    """A weight with its axes exchanged, and the operations on it.

    Raises:
        FitError: an operation on several matrices of a stack at once.
    """
    rows, cols = source.shape
    matrix = (rows // source.sizes[0] if len(source.sizes) == 3 else rows), cols
    try:
        moved = tuple(replace(each, view=views.turned(each.view, matrix)) for each in operations)
    except ValueError as error:
        raise FitError(
            f"an update {error}, which {source.kind} stores with their axes exchanged", tensor=source.name
        ) from error
    return turned(source), moved
