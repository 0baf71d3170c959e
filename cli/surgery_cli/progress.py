# SPDX-License-Identifier: Apache-2.0
"""A progress bar in bytes and bytes per second on stderr, where a person is watching."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from surgery_cli import interruption
from surgery_cli.options import Settings

if TYPE_CHECKING:
    from surgery.progress import Callback, Progress

__all__ = ["bar"]


@contextlib.contextmanager
def bar(settings: Settings, what: str) -> Iterator[Callback]:
    """The callback to hand to the library; it draws only where somebody watches, and always asks whether to stop."""
    if settings.json or settings.quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda step: interruption.check()
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
    )
    # transient: once the work is done its summary says more than a full bar
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None)

        def advance(step: Progress) -> None:
            interruption.check()
            label = what if step.phase == "writing" else step.phase
            shown.update(task, completed=step.done, total=step.total, description=label)

        yield advance
