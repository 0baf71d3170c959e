# SPDX-License-Identifier: Apache-2.0
"""``--html`` and ``--csv``: what a command shows, as files. A command that has them need not know of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from surgery_cli.options import PATH, Settings

if TYPE_CHECKING:
    from surgery.reports.summary import Summary

__all__ = ["Pages", "pages"]

F = TypeVar("F", bound=Callable[..., None])

_KINDS: Mapping[str, tuple[tuple[str, ...], str]] = {
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
    """

    files: Mapping[str, Path]
    overwrite: bool
    inputs: tuple[Path, ...]

    def check(self) -> None:
        """Refuse, before any work is done, what could not be written after it.

        Raises:
            click.BadParameter: the name of another kind of file.
            SurgeryError: as `write_single` does, whatever is not of the file's size.
        """
        for kind, path in self.files.items():
            suffixes, _ = _KINDS[kind]
            if path.suffix.lower() not in suffixes:
                raise click.BadParameter(f"the name of the file ends in {suffixes[0]}", param_hint=f"--{kind}")
            from surgery_formats.files.output.single import check_single, check_writable
            from surgery_formats.files.remote.path import on_a_disk

            on_a_disk(path, f"--{kind} writes to a disk")
            check_writable(check_single(path, overwrite=self.overwrite, inputs=self.inputs), path)

    def write(self, summary: Summary) -> tuple[Path, ...]:
        """Write `summary`, each file at once or not at all."""
        from surgery_formats.files.output.single import write_single

        render = {"html": summary.as_html, "csv": summary.as_csv, "md": summary.as_markdown}
        for kind, path in self.files.items():
            data = render[kind]().encode()
            job = hashlib.sha256(data).hexdigest()

            def fill(file: Any, data: bytes = data) -> None:
                file.pwrite(data, 0)

            write_single(path, job, len(data), fill, overwrite=self.overwrite, inputs=self.inputs)
        return tuple(self.files.values())


def pages(*kinds: str) -> Callable[[F], F]:
    """``--html`` and ``--csv``, and other `kinds`, last in a command's help; `surgery_cli.output` writes the files.

    It stands above all other options, so that it knows them: a command without ``--overwrite`` gets one.
    """

    def wrap(function: F) -> F:
        known = ("html", "csv", *kinds)
        params: list[click.Parameter] = getattr(function, "__click_params__", [])
        own = any(parameter.name == "overwrite" for parameter in params)

        @wraps(function)
        def run(settings: Settings, **options: Any) -> None:
            asked = {kind: path for kind in known if (path := options.pop(f"{kind}_file")) is not None}
            overwrite = options["overwrite"] if own else options.pop("overwrite")
            settings.pages = Pages(asked, overwrite, tuple(_inputs(options.values())))
            settings.pages.check()
            function(settings, **options)

        added = [
            click.Option([f"--{kind}", f"{kind}_file"], type=PATH, metavar="FILE", help=_KINDS[kind][1])
            for kind in known
        ]
        if not own:
            added.append(click.Option(["--overwrite"], is_flag=True, help="Replace FILE if it is there, atomically."))
        run.__click_params__ = [*reversed(added), *params]  # type: ignore[attr-defined]  # click reads it backwards
        return cast("F", run)

    return wrap


def _inputs(values: Iterable[object]) -> Iterator[Path]:
    """Whatever is there of what was named."""
    for value in values:
        if isinstance(value, str | Path):
            if os.path.exists(value):  # False where the text cannot be a name
                yield Path(value)
        elif isinstance(value, tuple):
            yield from _inputs(value)
        elif isinstance(value, dict):
            yield from _inputs(value.values())
