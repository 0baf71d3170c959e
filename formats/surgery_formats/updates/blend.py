# SPDX-License-Identifier: Apache-2.0
"""A share of an update that is not linear in its factors: ``W' = W + w (U(W) - W)``, and its inverse."""

from __future__ import annotations

from surgery_formats.arrays import Array, namespace
from surgery_formats.tensors.views import Index
from surgery_formats.updates.base import Apply

__all__ = ["blend", "unblend"]


def blend(whole: Apply, share: float) -> Apply:
    """`share` of the way from a block to the result of `whole`.

    Scaling only the B of a DoRA would still impose its magnitudes.
    """

    def apply(block: Array, rows: Index, cols: Index) -> Array:
        before = namespace(block).asarray(block, copy=True)
        before += share * (whole(block, rows, cols) - before)
        return before

    return apply


def unblend(setting: Apply, share: float) -> Apply:
    """The inverse of a share other than 1 of an update that sets values: ``W = W' + w / (1 - w) (W' - U(W'))``.

    Where nothing is set, ``U(W')`` is ``W'``, and nothing changes.
    """

    def apply(block: Array, rows: Index, cols: Index) -> Array:
        before = namespace(block).asarray(block, copy=True)
        kept = namespace(block).asarray(block, copy=True)
        before += share / (1 - share) * (before - setting(kept, rows, cols))
        return before

    return apply
