# SPDX-License-Identifier: Apache-2.0
"""The files that a command's pages and tables are written to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from surgery.reports.summary import Summary

__all__ = ["KINDS", "Pages"]


KINDS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "html": ((".html", ".htm"), "Write it as a page too: one file with pictures, which loads nothing."),
    "csv": ((".csv",), "Write its tables and facts too, numbers in full."),
    "md": ((".md", ".markdown"), "Write it as Markdown too."),
}


@dataclass(frozen=True, slots=True)
class Pages:
    """The files that were asked for.

    Attributes:
        files: By kind.
        overwrite: Whether a file that is there is replaced.
        inputs: Files and folders that the command line names: none of them is written to.
        command: Its name, for the pages.
        subjects: What it was given, for the pages.
    """

    files: Mapping[str, Path]
    overwrite: bool
    inputs: tuple[Path, ...]
    command: str = ""
    subjects: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse, before any work is done, what could not be written after it.

        Raises:
            click.BadParameter: the name of another kind of file.
            SurgeryError: as `write_single` does, whatever is not of the file's size.
        """
        for kind, path in self.files.items():
            suffixes, _ = KINDS[kind]
            if path.suffix.lower() not in suffixes:
                raise click.BadParameter(f"the name of the file ends in {suffixes[0]}", param_hint=f"--{kind}")
            from surgery_formats.files.output.single import check_single, check_writable
            from surgery_formats.files.remote.path import on_a_disk

            on_a_disk(path, f"--{kind} writes to a disk")
            check_writable(check_single(path, overwrite=self.overwrite, inputs=self.inputs), path)

    def write(self, summary: Summary) -> tuple[Path, ...]:
        """Write `summary`, each file at once or not at all."""
        from surgery_formats.files.output.single import write_single

        summary = summary.asked(self.command, self.subjects)
        render = {"html": summary.as_html, "csv": summary.as_csv, "md": summary.as_markdown}
        for kind, path in self.files.items():
            data = render[kind]().encode()
            job = hashlib.sha256(data).hexdigest()

            def fill(file: Any, data: bytes = data) -> None:
                file.pwrite(data, 0)

            write_single(path, job, len(data), fill, overwrite=self.overwrite, inputs=self.inputs)
        return tuple(self.files.values())
