# SPDX-License-Identifier: Apache-2.0
"""How a table becomes a picture: which columns lie along which axis. A drawing holds no numbers but its marks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Bars", "Drawing", "HeatMap", "Lines", "Mark"]


@dataclass(frozen=True, slots=True)
class Mark:
    """A line across a drawing, with a word beside it: a knee, the edge of noise.

    Attributes:
        text: The word.
        x: Where it crosses the horizontal axis, if it does.
        y: Where it crosses the vertical axis, if it does.
    """

    text: str
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True, slots=True)
class Lines:
    """Points joined by lines.

    Attributes:
        x: The column along the horizontal axis.
        y: The columns along the vertical axis, of one type.
        by: The column whose values part the rows into lines; all rows are one line without it.
        log_x: Whether equal distances are equal ratios, horizontally.
        log_y: Likewise vertically.
        label: What lies along the vertical axis, where several columns do.
        joined: False for points alone.
        marks: Lines across.
    """

    x: int
    y: tuple[int, ...]
    by: int | None = None
    log_x: bool = False
    log_y: bool = False
    label: str = ""
    joined: bool = True
    marks: tuple[Mark, ...] = ()
    kind: Literal["lines"] = "lines"


@dataclass(frozen=True, slots=True)
class Bars:
    """A group of bars per row.

    Attributes:
        label: The column that names a row.
        values: The columns that are drawn, of one type.
        stacked: Whether the bars of a row lie end to end.
    """

    label: int
    values: tuple[int, ...]
    stacked: bool = False
    kind: Literal["bars"] = "bars"


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A cell for each number: rows of the table from left to right, its columns from top to bottom.

    Attributes:
        label: The column that names a row.
        values: The columns that are drawn, of one type.
        log: Whether equal steps of the colour are equal ratios.
        low: Value of the lightest colour; None is 0 or the least, and with `log` at most half of the greatest.
        high: Value of the darkest colour; None is the greatest.
    """

    label: int
    values: tuple[int, ...]
    log: bool = False
    low: float | None = None
    high: float | None = None
    kind: Literal["heat map"] = "heat map"


Drawing = Lines | Bars | HeatMap
