# SPDX-License-Identifier: Apache-2.0
"""Lenses: one logical weight seen through the bytes that hold it.

A *storage* is the matrix on disk (`storage.Plain`: one stored tensor flattened after its first axis). A *view* is a pure index map between
the rows and columns of a logical weight and those of a storage. Every lens is a small function from view to view, so they compose:

    slice      rows of a fused projection            transpose  GPT-2's Conv1D, (in, out) on disk
    stack      one of E experts of a 3-D tensor      permute    rows in another order (rotary halves, interleaved heads)
    tie        two names, one storage
"""

from surgery_formats.lenses.parameter import Parameter
from surgery_formats.lenses.permute import interleaved, permute
from surgery_formats.lenses.slice import rows, window
from surgery_formats.lenses.stack import expert
from surgery_formats.lenses.storage import Plain
from surgery_formats.lenses.tie import Tie, alias_of, ties_by_place
from surgery_formats.lenses.transpose import transpose
from surgery_formats.lenses.view import Index, Overlap, View, positions, take, whole

__all__ = [
    "Index",
    "Overlap",
    "Parameter",
    "Plain",
    "Tie",
    "View",
    "alias_of",
    "expert",
    "interleaved",
    "permute",
    "positions",
    "rows",
    "take",
    "ties_by_place",
    "transpose",
    "whole",
    "window",
]
