# SPDX-License-Identifier: Apache-2.0
"""Shared by updates that mix columns (`surgery_formats.updates.Mixing`): columns in whole groups, in their order."""

from __future__ import annotations

from surgery_formats.arrays import Array, array_of, namespace
from surgery_formats.dtypes import DType
from surgery_formats.tensors.views import Index
from surgery_formats.updates.base import Apply

__all__ = ["in_groups"]


def in_groups(group: int, turn: Apply) -> Apply:
    """`turn`, which is always given a range of columns that are whole groups of `group` neighbours.

    Permuted storage hands columns over in another order: they are put in order, and back.
    """

    def apply(block: Array, rows: Index, cols: Index) -> Array:
        if isinstance(cols, range):
            if cols.step != 1 or cols.start % group or len(cols) % group:
                raise ValueError(f"columns {cols} are not whole groups of {group}")
            return turn(block, rows, cols)
        order = sorted(range(len(cols)), key=cols.__getitem__)
        at = array_of(order, DType.I64, block)
        there = range(cols[order[0]], cols[order[-1]] + 1)
        if len(there) != len(cols) or there.start % group or len(there) % group:
            raise ValueError(f"{len(cols)} of the columns {there} are not whole groups of {group}")
        block[:, at] = turn(namespace(block).take(block, at, axis=1), rows, there)
        return block

    # It must not call itself: a cycle of references would keep what `turn` holds of every weight until Python looks for cycles.
    return apply
