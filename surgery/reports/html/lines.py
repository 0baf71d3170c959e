# SPDX-License-Identifier: Apache-2.0
"""Lines and points over two axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from surgery.reports.drawings import Lines, Mark
from surgery.reports.html.axis import Axis, axis_over, number_of, tick_text
from surgery.reports.html.picture import CHARACTER, WIDTH, LegendEntry, Picture, Shape, label, marker, shortened
from surgery.reports.sections import Column, Table
from surgery.reports.values import Cell, cell_text

__all__ = ["draw_lines"]

_HEIGHT, _TOP, _BOTTOM, _RIGHT = 250, 22, 34, 14
_MARKED = 64  # points of a line; more are a line without markers

Series = dict[str, list[tuple[float, float]]]


def draw_lines(table: Table, drawing: Lines) -> Picture | None:
    """The lines of `drawing`; None where no row has a point."""
    series = _series(table, drawing)
    points = [point for line in series.values() for point in line]
    if not points:
        return None
    x_column, y_column = table.columns[drawing.x], table.columns[drawing.y[0]]
    y_marks = [mark.y for mark in drawing.marks if mark.y is not None]
    heights = [y for _, y in points] + y_marks
    near_zero = not drawing.log_y and min(heights) >= 0
    vertical = axis_over(heights, _HEIGHT - _BOTTOM, _TOP, log=drawing.log_y, zero=near_zero)
    left = 12 + CHARACTER * max((len(tick_text(tick, y_column.type)) for tick in vertical.ticks), default=0)
    horizontal = axis_over((x for x, _ in points), left, WIDTH - _RIGHT, log=drawing.log_x, each=True)
    y_name = drawing.label or (y_column.heading if len(drawing.y) == 1 else y_column.type)
    shapes = [*_frame(horizontal, vertical, x_column, y_column, y_name)]
    for number, (name, line) in enumerate(series.items()):
        shapes += _line(number, name, line, horizontal, vertical, (x_column, y_column), joined=drawing.joined)
    shapes += _marks(drawing.marks, horizontal, vertical)  # last, so that no line runs through their words
    legend = tuple(_key(number, name, joined=drawing.joined) for number, name in enumerate(series))
    about = f"{y_name} over {x_column.heading}"
    return Picture(_HEIGHT, tuple(shapes), legend if len(legend) > 1 else (), about)


def _series(table: Table, drawing: Lines) -> Series:
    """The points of each line. A column of one value for each place is one line, whatever the rows are parted by."""
    found: Series = {}
    groups = list(dict.fromkeys(_named(row, table, drawing.by) for row in table.rows))
    for column in drawing.y:
        lines = {group: _points(table, drawing, column, group) for group in groups}
        heading = table.columns[column].heading
        all_points = {point for line in lines.values() for point in line}
        if len(drawing.y) > 1 and len(all_points) == len({x for x, _ in all_points}):
            found |= {heading: sorted(all_points)} if all_points else {}
            continue
        for group, line in lines.items():
            if line:
                parts = ([heading] if len(drawing.y) > 1 else []) + ([group] if group else [])
                found[", ".join(parts) or heading] = line
    return found


def _points(table: Table, drawing: Lines, column: int, group: str) -> list[tuple[float, float]]:
    points = []
    for row in table.rows:
        x, y = number_of(row[drawing.x]), number_of(row[column])
        if x is None or y is None or _named(row, table, drawing.by) != group:
            continue
        if (x > 0 or not drawing.log_x) and (y > 0 or not drawing.log_y):
            points.append((x, y))
    return sorted(points)


def _named(row: Sequence[Cell], table: Table, by: int | None) -> str:
    return "" if by is None else cell_text(row[by], table.columns[by].type)


def _frame(horizontal: Axis, vertical: Axis, x_column: Column, y_column: Column, y_name: str) -> Iterator[Shape]:
    """Grid, values beside the axes, and what they are."""
    for tick in vertical.ticks:
        y = round(vertical.at(tick), 1)
        yield Shape("line", {"x1": round(horizontal.begin, 1), "x2": horizontal.end, "y1": y, "y2": y, "class": "grid"})
        yield label(horizontal.begin - 5, y + 3.5, tick_text(tick, y_column.type), anchor="end")
    floor = vertical.begin
    yield Shape(
        "line", {"x1": round(horizontal.begin, 1), "x2": horizontal.end, "y1": floor, "y2": floor, "class": "axis"}
    )
    free = -float("inf")
    for tick in horizontal.ticks:
        text, x = tick_text(tick, x_column.type), horizontal.at(tick)
        if x - CHARACTER * len(text) / 2 > free:
            yield label(min(x, WIDTH - CHARACTER * len(text) / 2), floor + 13, text, anchor="middle")
            free = x + CHARACTER * len(text) / 2 + 4
    yield label(horizontal.end, floor + 27, x_column.heading, anchor="end", kind="name")
    yield label(2, 10, y_name, kind="name")


def _marks(marks: Sequence[Mark], horizontal: Axis, vertical: Axis) -> Iterator[Shape]:
    """Lines across, each with its word; words of upright ones stand below each other."""
    upright = 0
    for mark in marks:
        if mark.x is not None:
            x = round(horizontal.at(mark.x), 1)
            yield Shape("line", {"x1": x, "x2": x, "y1": vertical.end, "y2": vertical.begin, "class": "mark"})
            left = x > (horizontal.begin + horizontal.end) / 2
            at = x - 4 if left else x + 4
            yield label(at, vertical.end + 9 + 12 * upright, mark.text, anchor="end" if left else "start", kind="said")
            upright += 1
        if mark.y is not None:
            y = round(vertical.at(mark.y), 1)
            ends = {"x1": round(horizontal.begin, 1), "x2": horizontal.end, "y1": y, "y2": y}
            yield Shape("line", {**ends, "class": "mark"})
            yield label(horizontal.end, y - 4, mark.text, anchor="end", kind="said")


def _line(
    number: int,
    name: str,
    line: Sequence[tuple[float, float]],
    horizontal: Axis,
    vertical: Axis,
    columns: tuple[Column, Column],
    *,
    joined: bool,
) -> Iterator[Shape]:
    places = [(horizontal.at(x), vertical.at(y)) for x, y in line]
    if joined and len(places) > 1:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        yield Shape("path", {"d": path, "class": f"line s{number % 6} d{number // 6 % 3}"})
    if len(places) <= _MARKED or not joined:
        for (x, y), (at_x, at_y) in zip(line, places, strict=True):
            numbers = (
                cell_text(value, column.type, max(column.digits, 3))
                for value, column in zip((x, y), columns, strict=True)
            )
            yield marker(at_x, at_y, number, f"{shortened(name, 60)}: {' / '.join(numbers)}")


def _key(number: int, name: str, *, joined: bool) -> LegendEntry:
    path = Shape("path", {"d": "M0 6L24 6", "class": f"line s{number % 6} d{number // 6 % 3}"})
    return LegendEntry((*((path,) if joined else ()), marker(12, 6, number)), shortened(name, 60))
