# SPDX-License-Identifier: Apache-2.0
"""``--push``: an output that is also sent to the hub. Every command with ``-o`` has it, and none need know of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from surgery_formats.files.remote.hub_push import Pushed, PushTarget

__all__ = ["Push", "push_asked", "push_options"]

F = TypeVar("F", bound=Callable[..., Any])

_NAMES = ("push", "private", "commit_message")


@dataclass(frozen=True, slots=True)
class Push:
    """A push that was asked for, and that nothing speaks against so far.

    Attributes:
        target: Where it goes.
        quiet: Whether nothing is said while it lasts.
    """

    target: PushTarget
    quiet: bool

    def send(self, output: Path) -> Pushed:
        """Push what was written.

        Raises:
            SurgeryError: it failed; the hint says how to push it again.
        """
        from surgery.reports.output import nbytes_of
        from surgery_formats.errors import SurgeryError
        from surgery_formats.files.remote.hub_push import push
        from surgery_formats.text import nbytes, show

        again = f"'{show(str(output), 500)}' is complete; to push it again: {self._command(output)}"
        watched = sys.stderr.isatty()
        if not self.quiet:
            click.echo(f"pushing {nbytes(nbytes_of(output))} to {self.target.shown}", err=True)
        try:
            return push(output, self.target, bars=watched and not self.quiet)
        except SurgeryError as error:
            error.hint = f"{error.hint}; {again}" if error.hint else again
            raise
        except KeyboardInterrupt:
            click.echo(again, err=True)
            raise

    def _command(self, output: Path) -> str:
        target = self.target
        words = ["hf", "upload", target.repo, str(output), "." if output.is_dir() else output.name]
        words += ["--revision", target.branch] if target.branch else []
        words += ["--private"] if target.private else []
        words += ["--delete", "*"] if target.overwrite and output.is_dir() else []
        return shlex.join(words)


def push_options(function: F) -> F:
    """``--push``, ``--private`` and ``--commit-message``, behind the output."""
    for add in reversed(
        (
            click.option(
                "--push",
                metavar="ORG/NAME[@BRANCH]",
                callback=_hub_name,
                help="Send OUT to the Hugging Face hub too, in one commit, once it is complete.",
            ),
            click.option(
                "--private", is_flag=True, help="With --push: make a private repository; refuse a public one."
            ),
            click.option("--commit-message", metavar="TEXT", help="With --push: the commit's first line."),
        )
    ):
        function = add(function)
    return function


def push_asked(command: str, options: dict[str, Any], *, quiet: bool) -> Push | None:
    """Take the push out of a command's `options`, and refuse, before any work is done, what could not be pushed after it.

    Raises:
        click.UsageError: options that do not go together.
        SurgeryError: the hub would not take it.
    """
    if "push" not in options:
        return None
    name, private, message = (options.pop(option) for option in _NAMES)
    if name is None:
        if private or message is not None:
            raise click.UsageError("--private and --commit-message go with --push")
        return None
    from surgery_formats.containers.weight_files import holds_weights
    from surgery_formats.files.remote.hub_push import PushTarget, check_push
    from surgery_formats.files.remote.path import is_remote

    output: Path | None = options.get("output")
    if output is not None and is_remote(str(output)):
        raise click.UsageError("--push sends files of this machine, and OUT is in a bucket")
    message = message or f"Upload the output of surgery {command}"
    target = PushTarget(name.repo, name.revision, private, bool(options.get("overwrite")), message)
    check_push(target, output.name if output is not None and holds_weights(output.name) else None)
    return Push(target, quiet)


def _hub_name(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    if value is None:
        return None
    from surgery_formats.refs import parse_hub_name
    from surgery_formats.text import show

    name = parse_hub_name(value)
    if name is None or name.file is not None or "/" not in name.repo:
        raise click.BadParameter(f"'{show(value)}' is not ORG/NAME or ORG/NAME@BRANCH, a model on the hub", ctx, param)
    return name
