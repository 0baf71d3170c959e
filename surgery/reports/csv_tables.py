# SPDX-License-Identifier: Apache-2.0
"""The tables and facts of a summary as CSV (RFC 4180), numbers in full. No cell is a formula to a spreadsheet."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator

from surgery.reports.sections import Chart, Column, Facts, Section, Table
from surgery.reports.values import NUMERIC, Cell, Value, cell_text, phrase_text
from surgery_formats.text import clean

__all__ = ["as_csv"]

_FORMULA = re.compile(r"(^\s*|;\s*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])")
"""Where a spreadsheet would see a formula (OWASP, "CSV Injection"): at a cell's beginning, and behind a semicolon, which parts
cells where commas are decimal; also in full width. Control characters are escaped anyway."""

_MOST = 32_767
"""Characters of a cell: what Excel holds; readers have limits too (Python's is 131,072)."""


def as_csv(sections: Iterable[Section]) -> str:
    """All tables, one below the other: the heading of each, its rows, and an empty line between two. Facts come last."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    listed = tuple(sections)
    for number, table in enumerate((*_tables(listed), *_facts(listed))):
        if number:
            writer.writerow([])
        writer.writerow([_word(column.heading) for column in table.columns])
        writer.writerows(map(_cell, row, table.columns) for row in table.rows)
    return text.getvalue()


def _tables(sections: Iterable[Section]) -> Iterator[Table]:
    for section in sections:
        if isinstance(section, Chart):
            yield section.table
        elif isinstance(section, Table):
            yield section


def _facts(sections: Iterable[Section]) -> Iterator[Table]:
    """All facts as one table: a fact that begins with a number is that number."""
    rows = tuple(
        (phrase_text(label), said if isinstance(said, tuple) else (said,))
        for section in sections
        if isinstance(section, Facts)
        for label, said in section.rows
    )
    if rows:
        yield Table((Column("fact"), Column("value", "figure")), rows)


def _cell(cell: Cell, column: Column) -> str:
    if column.type == "figure" and isinstance(cell, tuple) and isinstance(cell[0], Value):
        cell = cell[0]  # a number with its share behind it
    type = cell.type if isinstance(cell, Value) else column.type
    value = cell.value if isinstance(cell, Value) else cell
    if isinstance(value, int | float) and not isinstance(value, bool) and type in NUMERIC:
        return "" if math.isnan(value) else repr(value)
    if type == "name" and isinstance(value, str):
        return _word(value)
    return _word(cell_text(cell, column.type, column.digits))


def _word(text: str) -> str:
    """A text cell that stays one, also where a spreadsheet opens it; what acts on a terminal is escaped."""
    safe = clean(text[:_MOST])[:_MOST]
    return _FORMULA.sub(r"\1'", safe)
