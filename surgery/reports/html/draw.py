# SPDX-License-Identifier: Apache-2.0
"""A chart as pictures."""

from __future__ import annotations

from surgery.reports.drawings import Bars, Drawing, HeatMap, Lines
from surgery.reports.html.bars import draw_bars
from surgery.reports.html.heat_map import draw_heat_map
from surgery.reports.html.lines import draw_lines
from surgery.reports.html.picture import Picture
from surgery.reports.sections import Chart, Table

__all__ = ["draw"]


def draw(chart: Chart) -> tuple[Picture, ...]:
    """The pictures of `chart`; none where its table has nothing to draw."""
    drawings = chart.drawings if isinstance(chart.drawings, tuple) else (chart.drawings,)
    return tuple(picture for drawing in drawings if (picture := _picture(chart.table, drawing)) is not None)


def _picture(table: Table, drawing: Drawing) -> Picture | None:
    match drawing:
        case Lines():
            return draw_lines(table, drawing)
        case Bars():
            return draw_bars(table, drawing)
        case HeatMap():
            return draw_heat_map(table, drawing)
