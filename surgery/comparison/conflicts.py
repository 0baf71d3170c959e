# SPDX-License-Identifier: Apache-2.0
"""The conflicts of two adapters on every weight that both change."""

from __future__ import annotations

from surgery.comparison.adapters import pairs_by_name
from surgery.comparison.conflict import conflict_of
from surgery.comparison.on_base import pairs_on
from surgery.reports.conflict import Conflict
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["conflicts_between"]


def conflicts_between(
    a: Adapter, b: Adapter, weights: tuple[float, float], base: Checkpoint | None = None
) -> dict[str, Conflict]:
    """By weight, where both add something of low rank. With `base` its names bring those of the two together.

    Raises:
        FitError: one of them does not fit the base.
    """
    pairs = pairs_by_name(a, b) if base is None else pairs_on(base, a, b)[0]
    both = {name: (mine, theirs) for name, (mine, theirs) in pairs.items() if mine and theirs}
    found = {name: conflict_of(mine, theirs, weights) for name, (mine, theirs) in both.items()}
    return {name: conflict for name, conflict in found.items() if conflict is not None}
