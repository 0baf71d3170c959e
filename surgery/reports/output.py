# SPDX-License-Identifier: Apache-2.0
"""Phrases that summaries of outputs share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.reports.sections import Note
from surgery.reports.values import Name, Phrase, Piece, Value

__all__ = ["DRY_RUN", "PATH", "counted", "destination", "nbytes_of", "written", "wrote"]

PATH = 500  # characters; a path is worth showing whole
DRY_RUN = Note("dry run: nothing was written")


def counted(numbers: Mapping[str, int], meanings: Mapping[str, str] | None = None) -> str:
    """Counts as text: ``21 copied, 14 kept (as they were)``, with `meanings` of words that do not tell by themselves."""
    told = {what: f" ({meaning})" for what, meaning in (meanings or {}).items()}
    return ", ".join(f"{number} {what}{told.get(what, '')}" for what, number in numbers.items())


def destination(output: Path | None, format: str) -> Phrase:
    """Where an adapter is written and in which format; a dry run may have no output."""
    return Name(format) if output is None else (Name(output, PATH), " (", Name(format), ")")


def wrote(output: Path, seconds: float) -> tuple[Piece, ...]:
    """The size of `output`, and how long it took if that is known."""
    took = (" in ", Value(seconds, "seconds")) if seconds else ()
    return Value(nbytes_of(output), "bytes"), *took


def written(output: Path | None, seconds: float) -> dict[str, Any]:
    """What the JSON of a written result begins with: the output, the time and the size, without which runs agree."""
    return {
        "output": None if output is None else str(output),
        "seconds": round(seconds, 3),
        "nbytes": nbytes_of(output),
    }


def nbytes_of(path: Path | None) -> int:
    """Size of a file, or of all files in a folder; 0 for a dry run, or if it no longer exists."""
    if path is None:
        return 0
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
