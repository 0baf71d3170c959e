# SPDX-License-Identifier: Apache-2.0
"""A drawing as SVG elements. Text and attributes are raw: the template escapes them, and nothing else writes markup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["WIDTH", "Attributes", "LegendEntry", "Picture", "Shape", "label", "marker", "shortened"]

WIDTH = 400
"""Units of every picture: a phone shows them at about one pixel each, so that text stays legible there."""
CHARACTER = 5.8
"""Units that a character of a picture's text takes, on average."""

Attributes = Mapping[str, str | float]


@dataclass(frozen=True, slots=True)
class Shape:
    """An element.

    Attributes:
        tag: Its name.
        attributes: With numbers in units of the picture.
        text: What a text says; of other elements what is shown where a pointer rests on them.
    """

    tag: Literal["line", "rect", "path", "text"]
    attributes: Attributes
    text: str = ""


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """An entry of a legend: its look and its meaning."""

    shapes: tuple[Shape, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawing.

    Attributes:
        height: In units; the width is `WIDTH`.
        shapes: In the order in which they are painted.
        legend: What its colours mean, if there is more than one.
        about: What lies along which axis, for those who do not see it.
    """

    height: float
    shapes: tuple[Shape, ...]
    legend: tuple[LegendEntry, ...]
    about: str


def label(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "tick") -> Shape:
    """A line of text at its base line."""
    return Shape("text", {"x": _round(x), "y": _round(y), "text-anchor": anchor, "class": kind}, text)


_MARKERS = (
    "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0",
    "m-2.7 -2.7h5.4v5.4h-5.4z",
    "m0 -3.4l3.2 5.8h-6.4z",
    "m0 -3.8l3.8 3.8l-3.8 3.8l-3.8 -3.8z",
)


def marker(x: float, y: float, series: int, text: str = "") -> Shape:
    """A point of the series with this number: shapes differ as colours do."""
    path = f"M{_round(x):g} {_round(y):g}{_MARKERS[series % len(_MARKERS)]}"
    return Shape("path", {"d": path, "class": f"dot s{series % 6}"}, text)


def shortened(text: str, limit: int) -> str:
    """`text` with its middle left out, if it has more than `limit` characters."""
    return (
        text
        if len(text) <= limit
        else f"{text[: limit // 2]}\N{HORIZONTAL ELLIPSIS}{text[-(limit - limit // 2 - 1) :]}"
    )


def _round(value: float) -> float:
    return round(value, 1)
