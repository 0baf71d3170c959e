# SPDX-License-Identifier: Apache-2.0
"""Sentences about outputs that several results have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from surgery.reports.sections import Note
from surgery.reports.values import Name, Phrase, Value

__all__ = ["DRY_RUN", "PATH", "counted", "destination", "nbytes_of", "wrote"]

PATH = 500  # characters; a path is worth showing whole
DRY_RUN = Note("dry run: nothing was written")


def counted(numbers: Mapping[str, int]) -> str:
    """``21 copied, 14 updated``."""
    return ", ".join(f"{number} {what}" for what, number in numbers.items())


def destination(output: Path | None, format: str) -> Phrase:
    """Where an adapter goes and in which format; a dry run may have no place."""
    return Name(format) if output is None else (Name(output, PATH), " (", Name(format), ")")


def wrote(output: Path, seconds: float) -> Phrase:
    """How much lies at `output`, and how long it took where that is known."""
    took = (" in ", Value(seconds, "seconds")) if seconds else ()
    return Value(nbytes_of(output), "bytes"), *took


def nbytes_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 for what is not there any more."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
