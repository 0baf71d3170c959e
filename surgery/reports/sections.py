# SPDX-License-Identifier: Apache-2.0
"""What a summary is made of: facts, tables, notes and verbatim text. They say what is to be seen, and nothing of how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery.reports.values import NUMERIC, Cell, Phrase, Type

__all__ = ["Column", "Facts", "Note", "Section", "Table", "Verbatim"]


@dataclass(frozen=True, slots=True)
class Facts:
    """Labels, each with a sentence.

    Attributes:
        rows: ``(label, sentence)``, in order. A label may be a `Name`.
    """

    rows: tuple[tuple[Phrase, Phrase], ...]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        heading: Its name.
        type: Of its cells, unless a cell is a sentence of its own.
        digits: See `surgery.reports.values.Value`.
        spare: Where there is no room for all columns, those with the greatest number go first; 0 stays.
    """

    heading: str
    type: Type = "text"
    digits: int = 2
    spare: int = 0

    @property
    def numeric(self) -> bool:
        """Whether its cells stand flush right."""
        return self.type in NUMERIC


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under typed columns. Renderers leave out a column that is empty in every row.

    Attributes:
        columns: At least one.
        rows: As many cells each as there are columns; a text cell's leading spaces are indentation.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Note:
    """A remark beside the data.

    Attributes:
        text: One line.
        level: ``hint`` for what comes next; ``omitted`` for what ``summary(verbose=True)`` shows too; ``warning`` for what the user
            should know.
    """

    text: Phrase
    level: Literal["hint", "omitted", "warning"] = "hint"


@dataclass(frozen=True, slots=True)
class Verbatim:
    """Text of a model or a program, shown as it is; only what a terminal would act upon is escaped."""

    text: str


Section = Facts | Table | Note | Verbatim
