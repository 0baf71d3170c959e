# SPDX-License-Identifier: Apache-2.0
"""Parts of a base's weight that some kinds take away from it: those along its singular vectors, or its first columns.

Each part is given as two factors whose product it is. A singular vector has no sign of its own, and the vectors of equal
singular values have no order; both cancel out in the product, so that any library's decomposition gives the same part.
What decides is float64: the vectors come from the Gram matrix of the short side, and a float32 base squares within it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from surgery_formats.arrays import Array, cast, empty, namespace
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index
from surgery_formats.updates.base import Weight

__all__ = ["Part", "all_blocks", "part_of", "whole_weight"]

Part = Literal["principal", "minor", "first columns"]
"""The part along the largest singular values, along the smallest, or ``Q_r R_r`` of the QR decomposition: the first r
columns, and what the others have in their span."""


def all_blocks(weight: Weight, shape: tuple[int, int], stored: Tensor) -> Iterator[tuple[Array, Index, Index]]:
    """The blocks of a weight of which an equation needs every element.

    Raises:
        FitError: the base holds it in pieces, of which `weight` is one; `stored`, a tensor of the update, is named.
    """
    seen = 0
    for block, rows, cols in weight.blocks():
        seen += len(rows) * len(cols)
        yield block, rows, cols
    if seen != shape[0] * shape[1]:
        raise FitError(
            "needs all of its weight at once, which the base holds in several tensors",
            file=stored.path,
            tensor=stored.name,
            hint="merge it into the model as it was trained, with its fused weights",
        )


def whole_weight(weight: Weight, shape: tuple[int, int], stored: Tensor) -> Array:
    """All of `weight`, logical ``(out, in)``, in float64; see `all_blocks`."""
    values = empty(shape, DType.F64, weight.device)
    for block, rows, cols in all_blocks(weight, shape, stored):
        block = cast(block, DType.F64)
        if isinstance(rows, range) and isinstance(cols, range):
            values[_slice(rows), _slice(cols)] = block
        else:
            for position, row in enumerate(rows):
                values[row, list(cols)] = block[position]
    return values


def _slice(index: Index) -> slice:
    return slice(index.start, index.stop, index.step) if isinstance(index, range) else slice(None)


def part_of(values: Array, part: Part, rank: int) -> tuple[Array, Array]:
    """``(left (out, rank), right (rank, in))``, whose product is that part of `values` ``(out, in)``.

    Args:
        values: The weight in float64.
        part: Which part.
        rank: How many directions; at most the short side of `values`.
    """
    xp = namespace(values)
    rank = min(rank, *values.shape)
    if part == "first columns":
        Q, _ = xp.linalg.qr(values[:, :rank])
        return Q, Q.T @ values
    wide = values.shape[0] <= values.shape[1]
    _, vectors = xp.linalg.eigh(values @ values.T if wide else values.T @ values)  # in ascending order
    chosen = vectors[:, len(vectors) - rank :] if part == "principal" else vectors[:, :rank]
    return (chosen, chosen.T @ values) if wide else (values @ chosen, chosen.T)
