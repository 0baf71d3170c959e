# SPDX-License-Identifier: Apache-2.0
"""Where words go: data to stdout, everything else to stderr, and nothing from a file reaches a terminal unescaped."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery_cli.options import Settings

if TYPE_CHECKING:
    from surgery.reports.result import Result
    from surgery.reports.sections import Note, Section
    from surgery.reports.summary import Summary
    from surgery_formats.files.remote.hub_push import Pushed

__all__ = ["SCHEMA_VERSION", "emit_json", "show_output", "show_result"]

SCHEMA_VERSION = 1
"""Of every JSON document written here; it changes when a field is renamed or removed, not when one is added."""


def show_result(
    command: str, result: Result, settings: Settings, *, summary: Summary | None = None, data: bool = False
) -> None:
    """Show a result as a JSON document or a summary; warnings in any case.

    `summary` is by default ``result.summary(verbose=...)``. Where it is the `data` asked for, ``-q`` leaves out hints
    alone.
    """
    asked = settings.pages is not None and settings.pages.files
    if settings.quiet and not (settings.json or data or result.warnings or asked or settings.push):
        return  # nothing to show, and what would draw it need not be imported
    summary = summary or result.summary(verbose=settings.verbose > 0)
    if settings.pages is not None and asked:
        summary = summary.plus(*_wrote(settings.pages.write(summary)))
    shown: Iterable[Section] = summary.sections
    if settings.json:
        shown = summary.warnings
    elif settings.quiet:
        shown = (*summary.data, *summary.warnings) if data else summary.warnings
    _write(shown)
    pushed = None
    try:
        pushed = _pushed(result, settings)
    finally:  # what was written is there, pushed or not
        if settings.json:
            emit_json(command, result.as_json(), pushed)


def show_output(command: str, result: Any, settings: Settings, output: Path | None) -> None:
    """What was written, or what a dry run would write to `output`: that is there to be seen, quiet or not."""
    summary = result.summary(verbose=settings.verbose > 0, output=output)
    show_result(command, result, settings, summary=summary, data=result.output is None)


def emit_json(command: str, result: Any, pushed: Pushed | None = None) -> None:
    """The document of a command; NaN and infinities, which JSON lacks, become null."""
    from surgery.reports.to_json import plain

    document = {"schema_version": SCHEMA_VERSION, "command": command, "result": plain(result)}
    if pushed is not None:
        document["pushed"] = asdict(pushed)
    click.echo(json.dumps(document, indent=2, allow_nan=False))


def _write(sections: Iterable[Section]) -> None:
    """Notes to stderr, all else to stdout with a blank line between."""
    from surgery.reports.sections import Note
    from surgery.reports.text import section_lines, together

    width = _width()
    strong = partial(click.style, bold=True)
    previous: Section | None = None
    for section in sections:
        if isinstance(section, Note):
            click.echo(_note(section), err=True)
            continue
        lines = section_lines(section, width, strong)
        click.echo("\n".join(lines if previous is None or together(previous, section) else ["", *lines]))
        previous = section


def _pushed(result: Result, settings: Settings) -> Pushed | None:
    """Push what was written, if that was asked for; a dry run wrote nothing."""
    output = getattr(result, "output", None)
    if settings.push is None or output is None:
        return None
    from surgery.reports.output import PATH
    from surgery.reports.sections import Note
    from surgery.reports.summary import warning_notes
    from surgery.reports.values import Name

    pushed = settings.push.send(output)
    done = () if settings.quiet or settings.json else (Note(("pushed to ", Name(pushed.url, PATH))),)
    _write((*done, *warning_notes(pushed.warnings)))
    return pushed


def _wrote(paths: Iterable[Path]) -> Iterator[Note]:
    from surgery.reports.output import PATH
    from surgery.reports.sections import Note
    from surgery.reports.values import Name

    for path in paths:
        yield Note(("wrote ", Name(path, PATH)))


def _width() -> int | None:
    """Columns of the terminal; None for a pipe, where nothing is folded so that grep finds it."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _note(note: Note) -> str:
    from surgery.reports.text import section_lines

    (line,) = section_lines(note)
    return f"{line}; -v shows all" if note.level == "omitted" else line
