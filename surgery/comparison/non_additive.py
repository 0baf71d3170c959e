# SPDX-License-Identifier: Apache-2.0
"""Differences of updates that are not additive, or whose delta only the base could show.

Their factors are compared as they are.
"""

from __future__ import annotations

from surgery.comparison.additive import Chain, are_sums, ratio
from surgery.engine.factor_proof import tensor_error
from surgery_formats.updates import RowSetting, Update, settings

__all__ = ["unadded_differences"]

_NAMED = {
    "DoRA": ("magnitude", "magnitudes"),
    "replacement": ("value", "new values"),
    "token rows": ("value", "token rows"),
}
"""By kind: the factor that is compared by its norm, and what it is called."""


def unadded_differences(mine: Chain, theirs: Chain, limit: float) -> list[str]:
    """A note for each pair of updates that differ by more than `limit`; both chains are of the same kinds."""
    notes = []
    for kind, (factor, called) in _NAMED.items():
        pairs = zip(*([update for update in chain if update.kind == kind] for chain in (mine, theirs)), strict=True)
        notes += [note for update, other in pairs if (note := _by_norm(update, other, factor, called, limit))]
    others = ([u for u in chain if u.kind not in _NAMED and not are_sums((u,))] for chain in (mine, theirs))
    for update, other in zip(*others, strict=True):
        if type(update) is not type(other) or settings(update) != settings(other):
            notes.append(f"the settings of its {update.kind} differ")
        elif (by := tensor_error(update, other)) > limit:
            notes.append(f"the factors of its {update.kind} differ by {by:.2g}")
    return notes


def _by_norm(update: Update, other: Update, factor: str, called: str, limit: float) -> str:
    if isinstance(update, RowSetting) and isinstance(other, RowSetting) and update.indices != other.indices:
        return "other token rows"
    import torch

    left, right = (side.factors()[factor].load(torch.float64) for side in (update, other))
    if left.shape != right.shape:
        return f"{called} of other shapes"
    by = ratio(float((right - left).norm()), float(left.norm()))
    return f"{called} differ by {by:.2g}" if by > limit else ""
