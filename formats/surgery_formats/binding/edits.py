# SPDX-License-Identifier: Apache-2.0
"""All that happens to one tensor of an output, as data."""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.canonical.adapter import Site
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import View
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
        share: How far to go from the weight before to what the update makes of it; other than 1 only for kinds that are not linear in
            their factors (of the linear ones the update itself is scaled).
    """

    update: Update
    view: View
    site: Site
    adapter: int
    share: float = 1.0


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
    source: Tensor
    operations: tuple[Operation, ...]
    stacked: bool = False
    replaced: Operation | None = None
    added: bool = False
    why: str = ""
