# SPDX-License-Identifier: Apache-2.0
"""Tables of the commands whose results have no summary yet."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery_formats.text import show

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["SCHEMA_VERSION", "clean", "emit_json", "goal", "note", "pairs", "table", "warn"]

SCHEMA_VERSION = 1
"""Of every JSON document written here; it changes when a field is renamed or removed, not when one is added."""

_PIPED_WIDTH = 10_000  # columns where no terminal gives a width: a cell is never cut, so that grep finds it
_CELL = 200  # characters of a cell


def clean(text: str) -> str:
    """`text` without anything a terminal would act upon. Unlike `show` it leaves what `show` has escaped as it is."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def note(text: str) -> None:
    """A remark for people."""
    click.echo(clean(text), err=True)


def warn(text: str) -> None:
    """Something the user should know."""
    click.echo(f"warning: {clean(text)}", err=True)


def emit_json(command: str, result: Any) -> None:
    """The document of a command; NaN and infinities, which JSON lacks, become null."""
    document = {"schema_version": SCHEMA_VERSION, "command": command, "result": _finite(result)}
    click.echo(json.dumps(document, indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _console() -> Console:
    """Stdout for people: markup, emoji codes and highlighting off, because most of what is shown comes from files."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    return Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False, soft_wrap=False)


def pairs(rows: Iterable[tuple[str, str]]) -> None:
    """Lines ``label  text`` to stdout, the texts below each other."""
    every = list(rows)
    width = max((len(label) for label, _ in every), default=0)
    for label, text in every:
        click.echo(f"{click.style(label.ljust(width), bold=True)}  {clean(text)}")


def goal(output: Path | None, target: str) -> str:
    """Where an adapter goes and in which format; a dry run may have no place."""
    return show(target) if output is None else f"{show(output, 500)} ({show(target)})"


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Iterable[int] = (),
    spare: Iterable[int] = (),
) -> None:
    """A table to stdout, without the columns that say nothing in any row.

    Args:
        headings: One per column.
        rows: Cells; untrusted text is fine.
        right: Columns with numbers, set flush right.
        spare: Columns that a terminal too narrow for all of them does without, the first of them first.
    """
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    cells = [[_cell(cell) for cell in row] for row in rows]
    told = [index for index in range(len(headings)) if not cells or any(row[index] for row in cells)]
    terminal = _console()
    widths = [max(map(cell_len, (headings[index], *(row[index] for row in cells)))) for index in range(len(headings))]
    for index in spare:
        if index in told and sum(widths[one] + 2 for one in told) - 2 > terminal.width:
            told.remove(index)
    made = Table(box=None, pad_edge=False, header_style="bold")
    numbers = set(right)
    for index in told:
        number = index in numbers  # on a narrow terminal names are folded, numbers never
        made.add_column(headings[index], justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in cells:
        made.add_row(*(Text(row[index]) for index in told))
    with terminal.capture() as drawn:  # printed by click, for rich answers a closed pipe with an exit code of its own
        terminal.print(made)
    click.echo("\n".join(line.rstrip() for line in drawn.get().splitlines()))


def _cell(value: object) -> str:
    """Indentation is ours, the rest may not be."""
    text = str(value)
    bare = text.lstrip(" ")
    return text[: len(text) - len(bare)] + show(bare, _CELL)
