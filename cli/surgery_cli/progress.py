# SPDX-License-Identifier: Apache-2.0
"""Progress in bytes, or in tokens, and per second on stderr: a bar where a person is watching, else a line now and then."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from surgery_cli import interruption
from surgery_cli.options import Settings
from surgery_formats.text import nbytes

if TYPE_CHECKING:
    from surgery.progress import Callback, Progress

__all__ = ["bar"]

_SECONDS = 5.0  # between two lines


@contextlib.contextmanager
def bar(settings: Settings, what: str, *, unit: str = "bytes") -> Iterator[Callback]:
    """The callback to hand to the library; it shows a bar where somebody watches, and always asks whether to stop.

    Elsewhere, in a log, it is a line every few seconds.
    """
    if settings.json or settings.quiet:
        yield lambda step: interruption.check()
        return
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        lines = _LinesOfProgress(what, unit=unit)
        yield lines
        lines.done()
        return
    from rich import progress as rich
    from rich.console import Console

    of_bytes = (rich.DownloadColumn(), rich.TransferSpeedColumn())
    amounts = of_bytes if unit == "bytes" else (rich.MofNCompleteColumn(), rich.TextColumn(unit))
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), *amounts, rich.TimeRemainingColumn())
    # transient: once the work is done its summary says more than a full bar
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None)

        def advance(step: Progress) -> None:
            interruption.check()
            label = what if step.phase == "writing" else step.phase
            shown.update(task, completed=step.done, total=step.total, description=label)

        yield advance


class _LinesOfProgress:
    """Progress as lines of text, the first when a few seconds have passed."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic, *, unit: str = "bytes") -> None:
        self._what, self._clock, self._unit = what, clock, unit
        self._began = self._last = clock()
        self._said = False

    def __call__(self, step: Progress) -> None:
        interruption.check()
        now = self._clock()
        if now - self._last < _SECONDS:
            return
        self._last, self._said = now, True
        label = self._what if step.phase == "writing" else f"{self._what}, {step.phase}"
        if step.phase.startswith(self._what):
            label = step.phase
        share = f" ({step.done / step.total:.0%})" if step.total else ""
        speed = f", {self._amount(round(step.done / (now - self._began)))}/s" if step.done else ""
        click.echo(f"{label}: {self._amount(step.done)} of {self._amount(step.total)}{share}{speed}", err=True)

    def done(self) -> None:
        """Say that it is done, where it was said how far it is: else the last line would be of something unfinished."""
        if self._said:
            click.echo(f"{self._what}: done in {self._clock() - self._began:.0f} s", err=True)

    def _amount(self, number: int) -> str:
        return nbytes(number) if self._unit == "bytes" else f"{number:,} {self._unit}"
