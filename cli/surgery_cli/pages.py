# SPDX-License-Identifier: Apache-2.0
"""``--html`` and ``--csv``: what a command shows, as files. A command that has them need not know of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from surgery_cli.options import PATH, Settings
from surgery_cli.page_files import KINDS, Pages

if TYPE_CHECKING:
    pass

__all__ = ["pages"]

F = TypeVar("F", bound=Callable[..., None])


def pages(*kinds: str) -> Callable[[F], F]:
    """``--html`` and ``--csv``, and other `kinds`, last in a command's help; `surgery_cli.output` writes the files.

    It stands above all other options, so that it knows them: a command without ``--overwrite`` gets one.
    """

    def wrap(function: F) -> F:
        known = ("html", "csv", *kinds)
        params: list[click.Parameter] = getattr(function, "__click_params__", [])
        subjects = [parameter.name for parameter in reversed(params) if isinstance(parameter, click.Argument)]
        own = any(parameter.name == "overwrite" for parameter in params)

        @wraps(function)
        def run(settings: Settings, **options: Any) -> None:
            asked = {kind: path for kind in known if (path := options.pop(f"{kind}_file")) is not None}
            overwrite = options["overwrite"] if own else options.pop("overwrite")
            inputs = tuple(_inputs(options.values()))
            named = tuple(_words(options[name] for name in subjects if name is not None))
            command = click.get_current_context().command_path.partition(" ")[2]
            settings.pages = Pages(asked, overwrite, inputs, command, named)
            settings.pages.check()
            function(settings, **options)

        added = [
            click.Option([f"--{kind}", f"{kind}_file"], type=PATH, metavar="FILE", help=KINDS[kind][1])
            for kind in known
        ]
        if not own:
            added.append(click.Option(["--overwrite"], is_flag=True, help="Replace FILE if it is there, atomically."))
        run.__click_params__ = [*reversed(added), *params]  # type: ignore[attr-defined]  # click reads it backwards
        return cast("F", run)

    return wrap


def _words(values: Iterable[object]) -> Iterator[str]:
    """Paths and names, without the weights that stand beside them."""
    for value in values:
        if isinstance(value, str | Path):
            yield str(value)
        elif isinstance(value, tuple):
            yield from _words(value)


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
