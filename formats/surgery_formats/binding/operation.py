# SPDX-License-Identifier: Apache-2.0
"""One update meeting one weight, as data."""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.canonical.adapter import Site
from surgery_formats.tensors.views import View
from surgery_formats.updates import Update, is_linear

__all__ = ["Operation", "at_weight"]


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


def at_weight(update: Update, weight: float) -> tuple[Update, float]:
    """An update and its share, so that it counts `weight` times: an addition is scaled, of others a share is applied."""
    if is_linear(update):
        return (update if weight == 1.0 else update.scaled(weight)), 1.0
    return update, weight
