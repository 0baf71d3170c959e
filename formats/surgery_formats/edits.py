# SPDX-License-Identifier: Apache-2.0
"""All that happens to one tensor of an output, as data."""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.adapter import Site
from surgery_formats.lenses import View
from surgery_formats.tensors import StoredTensor
from surgery_formats.updates import Update

__all__ = ["Edit", "Operation"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One update meeting one view of a stored matrix.

    Attributes:
        update: The equation.
        view: Where its rows and columns lie in the storage.
        site: As the adapter names it.
        adapter: Position of its adapter in the list that was bound.
    """

    update: Update
    view: View
    site: Site
    adapter: int


@dataclass(frozen=True, slots=True)
class Edit:
    """All that happens to one tensor of the output.

    Attributes:
        component: Part of a pipeline, or empty.
        name: Name of the output tensor.
        source: Where its values come from: the base, or the adapter that replaces it.
        operations: In order.
        stacked: Whether the source is a 3-D stack of experts, ``(E, rows, cols)``.
        replaced: The replacement whose values `source` holds, if it is not the base's.
        added: Whether the base stores no tensor of this name (a head for a task, a head that was tied).
        why: For the ledger, where it is not plain.
    """

    component: str
    name: str
    source: StoredTensor
    operations: tuple[Operation, ...]
    stacked: bool = False
    replaced: Operation | None = None
    added: bool = False
    why: str = ""
