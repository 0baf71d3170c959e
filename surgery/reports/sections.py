# SPDX-License-Identifier: Apache-2.0
"""The parts of a summary: facts, tables, charts, notes and verbatim text. They hold what is shown; renderers decide how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery.reports.drawings import Drawing
from surgery.reports.values import NUMERIC, Cell, Phrase, Type

__all__ = ["Chart", "Column", "Facts", "Note", "Section", "Table", "Verbatim"]


@dataclass(frozen=True, slots=True)
class Facts:
    """Labelled facts.

    Attributes:
        rows: Pairs ``(label, sentence)``, in order.
    """

    rows: tuple[tuple[Phrase, Phrase], ...]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        heading: The column's title.
        type: How its cells are written.
        digits: See `surgery.reports.values.Value`.
        spare: Where space is short, the columns with the greatest number are dropped first; 0 is never dropped.
        says: What its numbers are, for those who meet them for the first time: pages have it below the table.
    """

    heading: str
    type: Type = "text"
    digits: int = 2
    spare: int = 0
    says: str = ""

    @property
    def numeric(self) -> bool:
        """Whether cells are right-aligned."""
        return self.type in NUMERIC


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under typed columns. Renderers leave out columns that are empty in every row.

    Attributes:
        columns: The columns; never empty.
        rows: One cell per column. Leading spaces of a text cell are indentation.
        caption: What the rows are, where a page needs it.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """A table that can be drawn; its numbers are the table's, so that a drawing and the figures beside it agree.

    Attributes:
        title: What it shows, in our own words.
        table: The numbers.
        drawings: How its columns become pictures, where a renderer draws: one or several.
        says: The finding, to be read behind the title; it stands for the numbers where there is room for a line alone. A
            chart without one is its table there.
    """

    title: str
    table: Table
    drawings: Drawing | tuple[Drawing, ...]
    says: Phrase = ""


@dataclass(frozen=True, slots=True)
class Note:
    """A remark of one line.

    Attributes:
        text: The remark.
        level: ``hint`` for context and next steps, ``omitted`` for what only ``summary(verbose=True)`` shows,
            ``warning`` for what the user should know.
    """

    text: Phrase
    level: Literal["hint", "omitted", "warning"] = "hint"


@dataclass(frozen=True, slots=True)
class Verbatim:
    """Text of a model or a program, shown unchanged except for control characters."""

    text: str


Section = Facts | Table | Chart | Note | Verbatim
