# SPDX-License-Identifier: Apache-2.0
"""Bars from left to right, a group or a stack for each row. Long names stand above their bars."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.reports.drawings import Bars
from surgery.reports.html.axis import Axis, axis_over, number_of
from surgery.reports.html.picture import CHARACTER, WIDTH, LegendEntry, Picture, Shape, label, shortened
from surgery.reports.sections import Table
from surgery.reports.values import cell_text

__all__ = ["draw_bars"]

_BAR, _GAP = 13, 9
_BESIDE, _ABOVE = 22, 60  # characters of a name
_LINE = 15  # of text
_ROWS = 40  # drawn; the table has all


def draw_bars(table: Table, drawing: Bars) -> Picture | None:
    """The bars of `drawing`; None where no row has any."""
    rows = [row for row in table.rows if any(number_of(row[column]) for column in drawing.values)][:_ROWS]
    if not rows:
        return None
    names = [shortened(cell_text(row[drawing.label], table.columns[drawing.label].type), _ABOVE) for row in rows]
    beside = max(map(len, names)) <= _BESIDE
    lengths = [[max(number_of(row[column]) or 0.0, 0.0) for column in drawing.values] for row in rows]
    type, digits = table.columns[drawing.values[0]].type, table.columns[drawing.values[0]].digits
    said = [[cell_text(row[column], type, digits) for column in drawing.values] for row in rows]
    left = 8 + CHARACTER * max(map(len, names)) if beside else 2.0
    room = 8 + CHARACTER * (0 if drawing.stacked else max(len(text) for texts in said for text in texts))
    most = max(sum(values) if drawing.stacked else max(values) for values in lengths)
    axis = axis_over((0.0, most), left, WIDTH - room, each=True)
    headings = [table.columns[column].heading for column in drawing.values]
    single = len(headings) == 1  # else the legend names them
    first = _LINE if single else 0
    bars = (1 if drawing.stacked else len(drawing.values)) * _BAR
    height = bars + _GAP + (0 if beside else _LINE)
    shapes = [label(2, 10, headings[0], kind="name")] if single else []
    for number, (name, values, texts) in enumerate(zip(names, lengths, said, strict=True)):
        below = first + (number + 1) * height - _GAP / 2
        if beside:
            shapes.append(label(left - 6, below - bars / 2 + 3.5, name, anchor="end"))
        else:
            shapes.append(label(left, below - bars - 4, name))
        shapes += _row(values, texts, axis, below - bars, stacked=drawing.stacked)
    x, end = round(left, 1), first + len(rows) * height
    if beside:  # above the bars it would run through the names
        shapes.append(Shape("line", {"x1": x, "x2": x, "y1": first, "y2": end, "class": "axis"}))
    legend = tuple(_key(number, heading) for number, heading in enumerate(headings)) if len(headings) > 1 else ()
    about = f"{', '.join(headings)} by {table.columns[drawing.label].heading}"
    return Picture(end + 2, tuple(shapes), legend, about)


def _row(values: list[float], texts: list[str], axis: Axis, top: float, *, stacked: bool) -> Iterator[Shape]:
    begin = 0.0
    for series, (value, text) in enumerate(zip(values, texts, strict=True)):
        x = axis.at(begin)
        width = axis.at(begin + value) - x
        y = top if stacked else top + series * _BAR
        if value:
            place = {"x": round(x, 1), "y": round(y, 1), "width": round(max(width, 0.5), 1), "height": _BAR - 1}
            yield Shape("rect", {**place, "class": f"bar s{series % 6}"}, text)
        if stacked:
            begin += value
            if value and width > CHARACTER * len(text) + 4:
                yield label(x + width / 2, y + 10, text, anchor="middle", kind="inside")
        elif text:
            yield label(x + width + 4, y + 10, text)


def _key(number: int, text: str) -> LegendEntry:
    return LegendEntry(
        (Shape("rect", {"x": 6, "y": 1, "width": 12, "height": 10, "class": f"bar s{number % 6}"}),), text
    )
