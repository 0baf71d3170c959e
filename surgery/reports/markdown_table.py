# SPDX-License-Identifier: Apache-2.0
"""Tables of Markdown, for model cards as well as for reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["table_lines"]


def table_lines(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """A table of cells that are already Markdown."""
    numeric = set(right)
    rule = ["---:" if index in numeric else "---" for index in range(len(headings))]
    return [_row(headings), f"|{'|'.join(rule)}|", *map(_row, rows)]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
