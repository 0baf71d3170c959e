# SPDX-License-Identifier: Apache-2.0
"""Where in the layers a merge changed most, and where least of that survived."""

from __future__ import annotations

import math
from collections.abc import Iterator

from surgery.engine.ledger import Ledger
from surgery.reports.layer_grid import layer_chart
from surgery.reports.sections import Chart
from surgery_formats.linalg.survival import Survival

__all__ = ["merge_charts"]


def merge_charts(ledger: Ledger) -> Iterator[Chart]:
    """Heat maps of the layers, from the sample of rows that was measured; of models without layers none."""
    kept = [
        (tensor.weight_label, measured)
        for tensor in ledger.plan.weights
        if (measured := ledger.measured.get(tensor.label))
    ]
    kept = [(label, measured) for label, measured in kept if measured.update > 0]
    sizes = ((label, measured.update, float(measured.sampled)) for label, measured in kept)
    survivals = ((label, measured.stored, measured.update) for label, measured in kept)
    yield from filter(
        None,
        (
            layer_chart("Change of a value (RMS, absolute)", sizes, _mean, log=True),
            layer_chart("Survival of the update", survivals, _share, type="share", low=0.0, high=1.0, worst="least"),
        ),
    )
    codes = [(tensor.weight_label, measured.kept) for tensor, measured, _ in ledger.requantised]
    if chart := _correlations(codes):
        yield chart


def _correlations(codes: list[tuple[str, Survival]]) -> Chart | None:
    """Of weights whose codes were chosen anew; of experts the mean of theirs."""
    entries = ((label, kept.correlation, 1.0) for label, kept in codes)
    title = "Correlation of the stored codes' change with the update"
    return layer_chart(title, entries, _share, low=0.0, high=1.0, worst="least")


def _mean(squares: float, count: float) -> float:
    return math.sqrt(squares / count) if count else math.nan


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
