# SPDX-License-Identifier: Apache-2.0
"""The edit of one weight of an output as data, and the equations that apply it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import Storage
from surgery_formats.tensors.apply import Apply
from surgery_formats.tensors.views import View
from surgery_formats.updates import Update, blend
from surgery_formats.updates.weights import WeightView

__all__ = ["Edit", "Operation", "prepared"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One update meeting one view of a storage.

    Attributes:
        update: The equation.
        view: Where its rows and columns lie in the storage.
        site: Its site in the adapter.
        adapter: Index of its adapter in the bound list.
        share: How far to go from the old weight to the updated one. Other than 1 only for kinds that are not linear in
            their factors; a linear update is scaled itself.
    """

    update: Update
    view: View
    site: Site
    adapter: int
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Edit:
    """All operations on one weight of the output.

    Attributes:
        component: Part of a pipeline, or empty.
        name: Name of the weight in the output.
        source: Where its values come from: the base, or the adapter that replaces them.
        operations: In order.
        replaced: The replacement whose values `source` holds, if it is not the base's.
        added: Whether the base has no weight of this name (a head for a task, a head that was tied).
        why: The reason, for the ledger, where it is not obvious.
    """

    component: str
    name: str
    source: Storage
    operations: tuple[Operation, ...]
    replaced: Operation | None = None
    added: bool = False
    why: str = ""


def prepared(
    operations: Iterable[Operation], source: Storage, dtype: DType, height: int, device: str = "cpu"
) -> list[tuple[View, Apply]]:
    """The equations of `operations` for `apply_chain`, with their factors loaded.

    Each sees `source` as the operations before it leave it.

    Args:
        operations: In order.
        source: The weight they begin with.
        dtype: Precision of the arithmetic.
        height: Storage rows per block for updates that read the weight first.
        device: Where the arithmetic runs.

    Raises:
        FitError: a factor holds NaN or Inf.
    """
    chain: list[tuple[View, Apply]] = []
    for operation in operations:
        weight = WeightView(source, tuple(chain), operation.view, dtype, device, height)
        apply = operation.update.prepare(weight)
        chain.append((operation.view, apply if operation.share == 1.0 else blend(apply, operation.share)))
    return chain
