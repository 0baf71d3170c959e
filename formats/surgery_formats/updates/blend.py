# SPDX-License-Identifier: Apache-2.0
"""A share of an update that is not linear in its factors: ``W' = W + w (U(W) - W)``."""

from __future__ import annotations

from surgery_formats.arrays import Array, namespace
from surgery_formats.tensors.views import Index
from surgery_formats.updates.base import Apply

__all__ = ["blend"]


def blend(whole: Apply, share: float) -> Apply:
    """`share` of the way from a block to the result of `whole`.

    Scaling only the B of a DoRA would still impose its magnitudes.
    """

    def apply(block: Array, rows: Index, cols: Index) -> Array:
        before = namespace(block).asarray(block, copy=True)
        before += share * (whole(block, rows, cols) - before)
        return before

    return apply
