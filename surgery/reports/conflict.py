# SPDX-License-Identifier: Apache-2.0
"""How two adapters get in each other's way on one weight: directions they share, and single directions that are too strong."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from surgery.reports.drawings import Lines, Mark
from surgery.reports.layer_grid import layer_chart
from surgery.reports.sections import Chart, Column, Table
from surgery.reports.values import Value

__all__ = ["Conflict", "conflict_charts"]


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two low-rank deltas of one weight beside each other.

    An overlap is the mean squared cosine of the principal angles between two spaces: 1 where the smaller lies in the larger,
    0 where they are orthogonal (Hu et al. 2021, arXiv:2106.09685, section G).

    Attributes:
        inputs: Overlap of the inputs that both listen to, the row spaces of their A.
        outputs: Overlap of the outputs that both write to, the column spaces of their B.
        chance: The greater of what both overlaps would be of random spaces of the same dimensions.
        spikes: Of each, the share of its energy along its first direction: 1 of a rank-1 delta.
        growth: Largest singular value of their sum, over the larger one of the two: 1 where they do not meet, 2 where equal
            ones add up.
        input_cosines: Of the principal angles of the inputs, descending.
        output_cosines: Likewise of the outputs.
    """

    inputs: float
    outputs: float
    chance: float
    spikes: tuple[float, float]
    growth: float
    input_cosines: tuple[float, ...] = field(default=(), metadata={"json": False})
    output_cosines: tuple[float, ...] = field(default=(), metadata={"json": False})


def conflict_charts(conflicts: Mapping[str, Conflict]) -> Iterator[Chart]:
    """Principal angles over all weights, and by layer the overlap of inputs and the growth of the strongest direction."""
    if not conflicts:
        return
    yield _angles(tuple(conflicts.values()))
    inputs = ((name, conflict.inputs, 1.0) for name, conflict in conflicts.items())
    growths = ((name, conflict.growth, 1.0) for name, conflict in conflicts.items())
    spikes = ((name, max(conflict.spikes), 1.0) for name, conflict in conflicts.items())
    charts = (
        layer_chart("Overlap of the inputs of both", inputs, _mean, low=0.0, high=1.0),
        layer_chart("Growth of the strongest direction in their sum", growths, _mean, low=1.0, high=2.0),
        layer_chart(
            "Energy along one direction, the greater of both", spikes, _mean, type="share", digits=1, low=0.0, high=1.0
        ),
    )
    yield from filter(None, charts)


def _angles(conflicts: tuple[Conflict, ...]) -> Chart:
    """The median principal angles of inputs and outputs, in degrees: small ones are directions that both use."""
    columns = Column("angle", "integer"), Column("inputs", "number", 3), Column("outputs", "number", 3)
    sides = ([conflict.input_cosines for conflict in conflicts], [conflict.output_cosines for conflict in conflicts])
    count = min(len(cosines) for side in sides for cosines in side)
    rows = tuple(
        (
            number + 1,
            *(
                statistics.median(math.degrees(math.acos(min(cosines[number], 1.0))) for cosines in side)
                for side in sides
            ),
        )
        for number in range(count)
    )
    inputs, outputs, chance = (
        statistics.median(getattr(conflict, name) for conflict in conflicts) for name in ("inputs", "outputs", "chance")
    )
    says = (
        "overlap of inputs ", Value(inputs, "number", 2), ", of outputs ", Value(outputs, "number", 2), "; by chance ",
        Value(chance, "number", 2),
    )  # fmt: skip
    drawing = Lines(0, (1, 2), label="degrees", marks=(Mark("orthogonal", y=90.0),))
    return Chart("Principal angles between the two, medians", Table(columns, rows), drawing, says)


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan
