# SPDX-License-Identifier: Apache-2.0
"""A chain of changes on a block of storage rows: find each view's part of the block, change it, put it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from surgery_formats.tensors.views import Index, Overlap, View, take

if TYPE_CHECKING:
    import torch

__all__ = ["Apply", "apply_chain", "gather", "scatter"]

Apply = Callable[["torch.Tensor", Index, Index], "torch.Tensor"]
"""``apply(block, rows, cols) -> block'``: `block` holds the elements ``[rows, cols]`` and may be written into."""


def apply_chain(chain: Iterable[tuple[View, Apply]], block: torch.Tensor, start: int, stop: int) -> None:
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


def gather(block: torch.Tensor, at: Overlap) -> torch.Tensor:
    """The logical elements of `block` at `at`; shares its memory where both axes are plain ranges."""
    part = take(block, at.block_rows, at.block_cols)
    return part.T if at.transposed else part


def scatter(block: torch.Tensor, at: Overlap, values: torch.Tensor) -> None:
    """Put logical `values` back where `gather` took them from; costs nothing if they are that memory."""
    values = values.T if at.transposed else values
    if isinstance(at.block_rows, range) and isinstance(at.block_cols, range):
        target = take(block, at.block_rows, at.block_cols)
        if target.data_ptr() != values.data_ptr():
            target.copy_(values)
        return
    import torch

    rows, cols = (torch.tensor(list(index), device=block.device) for index in (at.block_rows, at.block_cols))
    block[rows[:, None], cols[None, :]] = values
