# SPDX-License-Identifier: Apache-2.0
"""A chain of changes on a block of storage rows: find each view's part of the block, change it, put it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from surgery_formats.arrays import Array, array_of, same_memory
from surgery_formats.dtypes import DType
from surgery_formats.tensors.views import Index, Overlap, View, take

__all__ = ["Apply", "apply_chain", "gather", "scatter"]

Apply = Callable[[Array, Index, Index], Array]
"""``apply(block, rows, cols) -> block'``: `block` holds the elements ``[rows, cols]`` and may be written into."""


def apply_chain(chain: Iterable[tuple[View, Apply]], block: Array, start: int, stop: int) -> None:
    """Every change of `chain`, in order and in place.

    Args:
        chain: Changes, each with the view it acts through.
        block: Storage rows ``[start, stop)``, shape ``(stop - start, cols)``.
        start: First row.
        stop: Row after the last.
    """
    for view, apply in chain:
        at = view.locate(start, stop)
        if at:
            scatter(block, at, apply(gather(block, at), at.rows, at.cols))


def gather(block: Array, at: Overlap) -> Array:
    """The logical elements of `block` at `at`; shares its memory where both axes are plain ranges."""
    part = take(block, at.block_rows, at.block_cols)
    return part.T if at.transposed else part


def scatter(block: Array, at: Overlap, values: Array) -> None:
    """Put logical `values` back where `gather` took them from; costs nothing if they are that memory."""
    values = values.T if at.transposed else values
    if isinstance(at.block_rows, range) and isinstance(at.block_cols, range):
        target = take(block, at.block_rows, at.block_cols)
        if not same_memory(target, values):
            target[...] = values
        return
    rows, cols = (array_of(list(index), DType.I64, block) for index in (at.block_rows, at.block_cols))
    block[rows[:, None], cols[None, :]] = values
