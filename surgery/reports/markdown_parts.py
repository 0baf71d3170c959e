# SPDX-License-Identifier: Apache-2.0
"""Code spans and tables of Markdown, for model cards as well as for reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["code", "table_lines"]


def code(text: str) -> str:
    """Escaped text as a code span.

    Backticks and bars are replaced, so that it ends neither the span nor a table cell.
    """
    bare = text.replace("`", "'").replace("|", "\u00a6").strip()
    return f"`{bare}`" if bare else ""


def table_lines(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """A table of cells that are already Markdown."""
    numeric = set(right)
    rule = ["---:" if index in numeric else "---" for index in range(len(headings))]
    return [_row(headings), f"|{'|'.join(rule)}|", *map(_row, rows)]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
