# SPDX-License-Identifier: Apache-2.0
"""Values of a summary: numbers stay numbers and names stay raw until a renderer writes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from surgery_formats.text import clean, count, nbytes, show

__all__ = [
    "NUMERIC",
    "PLAIN",
    "Cell",
    "Name",
    "NameList",
    "Notation",
    "Phrase",
    "Piece",
    "Sides",
    "Type",
    "Value",
    "cell_text",
    "phrase_text",
]  # fmt: skip

Type = Literal[
    "text", "name", "figure", "shape", "flag",
    "integer", "count", "bytes", "rate", "seconds", "share", "number", "fixed", "spread",
]  # fmt: skip
"""How a value is written.

``text``: our own words. ``name``: text from outside, such as a path or a tensor's name. ``figure``: text aligned like a
number (``50/384``). ``shape``: ``64x128``. ``flag``: yes or no. ``integer``: all digits. ``count``: ``1.24 B``.
``bytes``: ``2.47 GB``. ``rate``: bytes per second. ``seconds``: ``0.52 s``. ``share``: percent. ``number``: significant
digits. ``fixed``: decimals. ``spread``: a mapping of numbers to how often they occur, ``16`` or ``8 (12 times), 16 (4
times)``.
"""

NUMERIC = frozenset(("figure", "integer", "count", "bytes", "rate", "seconds", "share", "number", "fixed", "spread"))
"""Types of right-aligned columns, which are never folded."""

_WORDS = frozenset(("text", "name", "figure"))
_CELL = 200  # characters of a name in a cell


@dataclass(frozen=True, slots=True)
class Name:
    """Text from outside: a path, a tensor's name, a value of a configuration file.

    Attributes:
        text: The raw text; renderers escape it.
        limit: Number of characters shown; longer text loses its middle.
    """

    text: object
    limit: int = 120


@dataclass(frozen=True, slots=True)
class NameList:
    """A list of names, shortened when it is shown.

    Attributes:
        texts: All names.
        limit: Number of names shown.
    """

    texts: tuple[str, ...]
    limit: int = 8


@dataclass(frozen=True, slots=True)
class Value:
    """A typed value in a sentence or a cell.

    Attributes:
        value: The value, usually a number.
        type: How it is written.
        digits: Decimals of ``share``, ``seconds`` and ``fixed``; significant digits of ``number`` and ``spread``.
    """

    value: Any
    type: Type = "number"
    digits: int = 2


@dataclass(frozen=True, slots=True)
class Sides:
    """Two compared values in one cell, written once if they are equal."""

    a: Any
    b: Any


Piece = str | Name | NameList | Value
Phrase = Piece | tuple[Piece, ...]
"""A sentence in one or several pieces. A string holds our own words, or a message of the library, whose names are
already escaped."""
Cell = object
"""A value of the column's type, None for an empty cell, `Sides`, a `Value` with its own type, or a `Phrase` in columns
of words."""


@dataclass(frozen=True, slots=True)
class Notation:
    """How a renderer writes text.

    Attributes:
        name: Formats a name, which is already escaped.
        words: Formats our own words and numbers.
    """

    name: Callable[[str], str]
    words: Callable[[str], str]


PLAIN = Notation(str, clean)
"""Plain text that is safe for a terminal."""


def phrase_text(phrase: Phrase, notation: Notation = PLAIN) -> str:
    """Write out a sentence."""
    return "".join(_piece(piece, notation) for piece in (phrase if isinstance(phrase, tuple) else (phrase,)))


def cell_text(cell: Cell, type: Type, digits: int = 2, notation: Notation = PLAIN) -> str:
    """Write out a cell of a column of type `type`; None and NaN become empty text."""
    if isinstance(cell, Sides):
        a, b = (cell_text(side, type, digits, notation) for side in (cell.a, cell.b))
        return a if a == b else f"{a or '-'}{notation.words(' | ')}{b or '-'}"
    if isinstance(cell, Name | NameList | Value) or (isinstance(cell, tuple) and type in _WORDS):
        return phrase_text(cell, notation)
    if type == "name":
        return "" if cell is None else notation.name(show(cell, _CELL))
    return notation.words(_number(cell, type, digits))


def _piece(piece: Piece, notation: Notation) -> str:
    match piece:
        case str():
            return notation.words(piece)
        case Name(text, limit):
            return notation.name(show(text, limit))
        case NameList(texts, limit):
            more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
            return notation.words(", ").join(notation.name(show(text)) for text in texts[:limit]) + notation.words(more)
        case Value(value, type, digits):
            return notation.words(_number(value, type, digits))


def _number(value: Any, type: Type, digits: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    match type:
        case "shape":
            return "x".join(map(str, value)) or "scalar"
        case "flag":
            return "yes" if value else "no"
        case "count":
            return count(value)
        case "bytes":
            return nbytes(value)
        case "rate":
            return f"{nbytes(value)}/s"
        case "seconds":
            return f"{value:.{digits}f} s"
        case "share":
            return f"{value:.{digits}%}"
        case "number":
            return f"{value:.{digits}g}"
        case "fixed":
            return f"{value:.{digits}f}"
        case "spread":
            single = len(value) == 1
            return ", ".join(
                f"{key:.{digits}g}" + ("" if single else f" ({times} time{'s' if times != 1 else ''})")
                for key, times in value.items()
            )
    return str(value)
