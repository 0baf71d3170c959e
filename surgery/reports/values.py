# SPDX-License-Identifier: Apache-2.0
"""The values of a summary: numbers stay numbers, names from files stay what they are, until a renderer writes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from surgery_formats.text import clean, count, nbytes, show

__all__ = [
    "NUMERIC", "PLAIN", "Cell", "Dialect", "Name", "Names", "Phrase", "Piece", "Sides", "Type", "Value", "cell_text", "phrase_text",
]  # fmt: skip

Type = Literal[
    "text", "name", "figure", "shape", "flag",
    "integer", "count", "bytes", "rate", "seconds", "share", "number", "fixed", "spread",
]  # fmt: skip
"""How a value is written:

``text`` our own words; ``name`` text that came from outside, a tensor's name or a path; ``figure`` words that stand in a column like
numbers (``50/384``); ``shape`` ``64x128``; ``flag`` yes or no; ``integer`` all its digits; ``count`` ``1.24 B``; ``bytes`` ``2.47 GB``;
``rate`` bytes per second; ``seconds`` ``0.52 s``; ``share`` in percent; ``number`` significant digits; ``fixed`` decimals; ``spread`` a
mapping of numbers to how often they occur: ``16``, or ``8 (12 times), 16 (4 times)``.
"""

NUMERIC = frozenset(("figure", "integer", "count", "bytes", "rate", "seconds", "share", "number", "fixed", "spread"))
"""Types that columns set flush right, and that are never broken over two lines."""

_WORDS = frozenset(("text", "name", "figure"))
_CELL = 200  # characters of a name in a cell


@dataclass(frozen=True, slots=True)
class Name:
    """Text that came from outside: a path, a tensor's name, a word of a configuration file.

    Attributes:
        text: As it is; a renderer escapes it.
        limit: Characters that are shown; the middle of what is longer is left out.
    """

    text: object
    limit: int = 120


@dataclass(frozen=True, slots=True)
class Names:
    """A list of names, of which the first few are shown.

    Attributes:
        texts: All of them.
        limit: How many are shown.
    """

    texts: tuple[str, ...]
    limit: int = 8


@dataclass(frozen=True, slots=True)
class Value:
    """A typed value within a sentence or a cell.

    Attributes:
        value: The number.
        type: How it is written.
        digits: Decimals of a share, of seconds and of what is fixed; significant digits of a number.
    """

    value: Any
    type: Type = "number"
    digits: int = 2


@dataclass(frozen=True, slots=True)
class Sides:
    """A cell for two things that are compared; written once where they are equal."""

    a: Any
    b: Any


Piece = str | Name | Names | Value
Phrase = Piece | tuple[Piece, ...]
"""A sentence, of one piece or several. A string is our own words, or a message of the library with the names in it escaped."""
Cell = object
"""What a column's type takes; None for an empty cell; `Sides`; a `Value` of its own; in columns of words also a sentence."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a renderer writes text.

    Attributes:
        name: What it makes of a name, which comes escaped.
        words: What it makes of our own words and of numbers.
    """

    name: Callable[[str], str]
    words: Callable[[str], str]


PLAIN = Dialect(str, clean)
"""Text for a terminal: nothing in it moves the cursor or forges a line."""


def phrase_text(phrase: Phrase, dialect: Dialect = PLAIN) -> str:
    """A sentence, written out."""
    return "".join(_piece(piece, dialect) for piece in (phrase if isinstance(phrase, tuple) else (phrase,)))


def cell_text(cell: Cell, type: Type, digits: int = 2, dialect: Dialect = PLAIN) -> str:
    """A cell, written out as `type`; empty for what is missing or NaN."""
    if isinstance(cell, Sides):
        a, b = (cell_text(side, type, digits, dialect) for side in (cell.a, cell.b))
        return a if a == b else f"{a or '-'}{dialect.words(' | ')}{b or '-'}"
    if isinstance(cell, Name | Names | Value) or (isinstance(cell, tuple) and type in _WORDS):
        return phrase_text(cell, dialect)
    if type == "name":
        return "" if cell is None else dialect.name(show(cell, _CELL))
    return dialect.words(_number(cell, type, digits))


def _piece(piece: Piece, dialect: Dialect) -> str:
    match piece:
        case str():
            return dialect.words(piece)
        case Name(text, limit):
            return dialect.name(show(text, limit))
        case Names(texts, limit):
            more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
            return dialect.words(", ").join(dialect.name(show(text)) for text in texts[:limit]) + dialect.words(more)
        case Value(value, type, digits):
            return dialect.words(_number(value, type, digits))


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
        case "spread" if len(value) != 1:
            return ", ".join(f"{key:.{digits}g} ({times} times)" for key, times in value.items())
        case "spread":
            return f"{next(iter(value)):.{digits}g}"
    return str(value)
