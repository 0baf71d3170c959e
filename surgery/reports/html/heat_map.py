# SPDX-License-Identifier: Apache-2.0
"""A heat map: rows of a table from left to right, its columns from top to bottom, numbers as nine colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from surgery.reports.drawings import HeatMap
from surgery.reports.html.axis import number_of, tick_text
from surgery.reports.html.picture import CHARACTER, WIDTH, Attributes, LegendEntry, Picture, Shape, label, shortened
from surgery.reports.sections import Column, Table
from surgery.reports.values import cell_text

__all__ = ["draw_heat_map"]

_COLOURS = 9
_RATIO, _ALIKE = 2, 1.25
"""From the lightest colour to the darkest, where colours go by ratios: at least. Numbers that are no farther apart than this
have one colour of their own, and the legend says so: shades would make much of little."""
_CELL, _HEADING, _NAME, _EACH = 20, 24, 18, 600
"""Height of a cell; characters of a name beside the cells, and of one below; cells that say their number: of more the page
would grow large."""


def draw_heat_map(table: Table, drawing: HeatMap) -> Picture | None:
    """The cells of `drawing`; None where there are none."""
    grid = [[_drawn(row[column], drawing) for row in table.rows] for column in drawing.values]
    known = [value for line in grid for value in line if value is not None]
    if not known:
        return None
    low, high = _scale(known, drawing)
    alike = drawing.low is None and drawing.high is None and _alike(known)
    headings = [shortened(table.columns[column].heading, _HEADING) for column in drawing.values]
    names = [cell_text(row[drawing.label], table.columns[drawing.label].type) for row in table.rows]
    left = 8 + CHARACTER * max(map(len, headings))
    width = (WIDTH - left - 4) / len(names)
    shapes = [label(left - 5, number * _CELL + 13.5, heading, anchor="end") for number, heading in enumerate(headings)]

    def bin_of(value: float) -> int:
        return _COLOURS // 2 if alike else _bin(value, low, high, log=drawing.log)

    binned = [[None if value is None else bin_of(value) for value in line] for line in grid]
    if len(known) <= _EACH:
        columns = [table.columns[column] for column in drawing.values]
        shapes += _cells(grid, binned, left, width, names, columns)
    else:
        shapes += _areas(binned, left, width)
    below = len(headings) * _CELL
    shapes += _names(names, left, width, below)
    long = max(map(len, names)) * CHARACTER > max(width, 24)
    height = below + (8 + CHARACTER * min(max(map(len, names)), _NAME) * 0.75 if long else 18)
    first = table.columns[drawing.values[0]]
    about = f"{table.columns[drawing.label].heading} from left to right; from top to bottom {', '.join(headings)}"
    legend = _legend_of_one(known, first) if alike else _legend(low, high, first, log=drawing.log)
    return Picture(height, tuple(shapes), legend, about)


def _alike(known: Sequence[float]) -> bool:
    low, high = min(known), max(known)
    return low == high or 0 < low < high <= low * _ALIKE


def _scale(known: Sequence[float], drawing: HeatMap) -> tuple[float, float]:
    """Values of the lightest and the darkest colour."""
    high = max(known) if drawing.high is None else drawing.high
    if drawing.low is not None:
        return drawing.low, high
    return (min(*known, high / _RATIO) if drawing.log else min(*known, 0.0)), high


def _drawn(cell: object, drawing: HeatMap) -> float | None:
    value = number_of(cell)
    return None if value is None or (drawing.log and value <= 0) else value


def _bin(value: float, low: float, high: float, *, log: bool) -> int:
    if high <= low:
        return _COLOURS - 1
    value = min(max(value, low), high)
    share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
    return min(int(share * _COLOURS), _COLOURS - 1)


def _cells(
    grid: Sequence[Sequence[float | None]],
    binned: Sequence[Sequence[int | None]],
    left: float,
    width: float,
    names: Sequence[str],
    columns: Sequence[Column],
) -> Iterator[Shape]:
    """Each cell by itself, with its number."""
    for down, (line, bins, column) in enumerate(zip(grid, binned, columns, strict=True)):
        for across, (value, colour) in enumerate(zip(line, bins, strict=True)):
            if colour is None:
                continue
            place: dict[str, str | float] = {
                "x": round(left + across * width, 2),
                "y": down * _CELL,
                "width": round(width, 2),
                "height": _CELL,
            }
            said = cell_text(value, column.type, max(column.digits, 3))
            yield Shape(
                "rect",
                {**place, "class": f"cell h{colour}"},
                f"{shortened(names[across], 40)}, {column.heading}: {said}",
            )


def _areas(binned: Sequence[Sequence[int | None]], left: float, width: float) -> Iterator[Shape]:
    """All cells of one colour as one path."""
    for colour in range(_COLOURS):
        path = "".join(
            f"M{left + across * width:.1f} {down * _CELL}h{width:.2f}v{_CELL}h-{width:.2f}z"
            for down, line in enumerate(binned)
            for across, found in enumerate(line)
            if found == colour
        )
        if path:
            yield Shape("path", {"d": path, "class": f"cell h{colour}"})


def _names(names: Sequence[str], left: float, width: float, below: float) -> Iterator[Shape]:
    """Names of the rows below their cells: as many as there is room for, aslant where they are long."""
    longest = max(map(len, names))
    aslant = longest * CHARACTER > max(width, 24)
    step = max(1, math.ceil((11 if aslant else longest * CHARACTER + 5) / width))
    for number in range(0, len(names), step):
        x = left + (number + 0.5) * width
        text = shortened(names[number], _NAME)
        if not aslant:
            yield label(x, below + 13, text, anchor="middle")
            continue
        turned: Attributes = {"x": round(x + 3, 1), "y": below + 10, "text-anchor": "end", "class": "tick"}
        yield Shape("text", {**turned, "transform": f"rotate(-45 {round(x + 3, 1)} {below + 10})"}, text)


def _legend(low: float, high: float, column: Column, *, log: bool) -> tuple[LegendEntry, ...]:
    """The colours in order, with the values of both ends."""
    swatches = tuple(
        Shape("rect", {"x": 2.5 * number, "y": 1, "width": 3, "height": 10, "class": f"h{number}"})
        for number in range(_COLOURS)
    )
    scale = "; equal steps are equal ratios" if log and high > low else ""
    ends = f"{tick_text(low, column.type)} (left) to {tick_text(high, column.type)} (right)"  # the theme says which is light
    return (LegendEntry(swatches, f"{ends}{scale}"),)


def _legend_of_one(known: Sequence[float], column: Column) -> tuple[LegendEntry, ...]:
    """The one colour of numbers that are alike."""
    low, high = (cell_text(value, column.type, max(column.digits, 3)) for value in (min(known), max(known)))
    swatch = Shape("rect", {"x": 6, "y": 1, "width": 12, "height": 10, "class": f"h{_COLOURS // 2}"})
    said = f"all are {low}" if low == high else f"all alike: {low} to {high}"
    return (LegendEntry((swatch,), said),)
