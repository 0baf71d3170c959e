# SPDX-License-Identifier: Apache-2.0
"""What an adapter's updates add, in norms and singular values, and where in the layers it is most."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from surgery.reports.drawings import Lines
from surgery.reports.layer_grid import layer_chart
from surgery.reports.sections import Chart, Column, Table

__all__ = ["DeltaFacts", "delta_charts"]


@dataclass(frozen=True, slots=True)
class DeltaFacts:
    """The delta of one parameter.

    Attributes:
        name: Of the parameter.
        role: ``attention``, ``mlp`` ...
        norm: Frobenius norm.
        stable_rank: ``||.||_F^2 / ||.||_2^2``.
        values: Singular values, descending.
    """

    name: str
    role: str
    norm: float
    stable_rank: float
    values: tuple[float, ...] = field(metadata={"json": False})


def delta_charts(deltas: Sequence[DeltaFacts]) -> Iterator[Chart]:
    """Norms and stable ranks by layer, and the spectra by role, relative to the first value."""
    norms = ((delta.name, delta.norm**2, 1.0) for delta in deltas)
    ranks = ((delta.name, delta.stable_rank, 1.0) for delta in deltas)
    charts = (
        layer_chart("Norm of the update", norms, lambda squares, _: math.sqrt(squares), log=True),
        layer_chart(
            "Stable rank of the update", ranks, lambda total, count: total / count if count else math.nan, low=1.0
        ),
    )
    yield from filter(None, charts)
    spectra: dict[str, list[tuple[float, ...]]] = {}
    for delta in deltas:
        if len(delta.values) > 1 and delta.values[0] > 0:
            spectra.setdefault(delta.role, []).append(delta.values)
    if spectra:
        yield _spectra(spectra)


def _spectra(spectra: dict[str, list[tuple[float, ...]]]) -> Chart:
    columns = Column("direction", "integer"), *(Column(role, "number", 3) for role in spectra)
    medians = [
        [statistics.median(values[n] / values[0] for values in group) for n in range(min(map(len, group)))]
        for group in spectra.values()
    ]
    rows = tuple(
        (n + 1, *(line[n] if n < len(line) else None for line in medians)) for n in range(max(map(len, medians)))
    )
    drawing = Lines(0, tuple(range(1, len(columns))), log_x=True, label="singular value, of the first")
    last = ", ".join(
        f"{role} falls to {line[-1]:.2g} at direction {len(line)}" for role, line in zip(spectra, medians, strict=True)
    )
    return Chart("Spectra of the update by role, medians", Table(columns, rows), drawing, last)
