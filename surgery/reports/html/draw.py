# SPDX-License-Identifier: Apache-2.0
"""A chart as a picture."""

from __future__ import annotations

from surgery.reports.drawings import Bars, HeatMap, Lines
from surgery.reports.html.bars import draw_bars
from surgery.reports.html.heat_map import draw_heat_map
from surgery.reports.html.lines import draw_lines
from surgery.reports.html.picture import Picture
from surgery.reports.sections import Chart

__all__ = ["draw"]


def draw(chart: Chart) -> Picture | None:
    """The picture of `chart`; None where its table has nothing to draw."""
    match chart.drawing:
        case Lines() as lines:
            return draw_lines(chart.table, lines)
        case Bars() as bars:
            return draw_bars(chart.table, bars)
        case HeatMap() as heat_map:
            return draw_heat_map(chart.table, heat_map)
