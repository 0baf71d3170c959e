# SPDX-License-Identifier: Apache-2.0
"""Markdown for reports and notebooks. Names from outside become code spans, never markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from surgery.reports.markdown_table import table_lines
from surgery.reports.sections import Chart, Column, Facts, Note, Section, Table, Verbatim
from surgery.reports.values import Cell, Notation, Phrase, cell_text, phrase_text
from surgery_formats.text import markdown, markdown_code, verbatim

__all__ = ["as_markdown", "markdown_rows"]

_INDENT = "\u2003"  # an em space for each two of indentation, which HTML would swallow


def as_markdown(title: str, sections: Iterable[Section]) -> str:
    """Render sections under the heading `title`."""
    lines = [f"# {markdown(title)}", ""] if title else []
    for section in sections:
        match section:
            case Facts(rows):
                lines += [*(f"- {label}: {text}" for label, text in markdown_rows(rows)), ""]
            case Table(columns, rows):
                lines += [*_table(columns, rows), ""]
            case Chart(name, table, _, says):
                said = [f"{markdown(name)}: {phrase_text(says, _MARKDOWN)}"] if says else None
                lines += [*(said or _table(table.columns, table.rows)), ""]
            case Note(text, level):
                lines += [f"{'**Warning:** ' if level == 'warning' else ''}{phrase_text(text, _MARKDOWN)}", ""]
            case Verbatim(text):
                lines += [*_fenced(verbatim(text)), ""]
    return "\n".join(lines)


def markdown_rows(facts: Iterable[tuple[Phrase, Phrase]]) -> list[tuple[str, str]]:
    """Facts as rows of a table in Markdown."""
    return [(phrase_text(label, _MARKDOWN), phrase_text(text, _MARKDOWN)) for label, text in facts]


def _table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> list[str]:
    cells = [[_cell(cell, column) for cell, column in zip(row, columns, strict=True)] for row in rows]
    shown = [index for index in range(len(columns)) if not cells or any(row[index] for row in cells)]
    right = [place for place, index in enumerate(shown) if columns[index].numeric]
    headings = [markdown(columns[index].heading) for index in shown]
    return table_lines(headings, ([row[index] for index in shown] for row in cells), right)


def _cell(cell: Cell, column: Column) -> str:
    indent = ""
    if isinstance(cell, str):
        indent = _INDENT * ((len(cell) - len(cell.lstrip(" "))) // 2)
        cell = cell.lstrip(" ")
    return indent + cell_text(cell, column.type, column.digits, _MARKDOWN)


def _fenced(text: str) -> list[str]:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [fence, *text.split("\n"), fence]


_MARKDOWN = Notation(markdown_code, markdown)
