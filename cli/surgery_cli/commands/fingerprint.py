# SPDX-License-Identifier: Apache-2.0
"""``surgery fingerprint``."""

from __future__ import annotations

from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_result
from surgery_cli.pages import pages
from surgery_cli.progress import bar

__all__ = ["command"]

_FINDINGS = 6


@subcommand("fingerprint")
@pages()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", shell_complete=complete_files)
@option.reference(
    "--against", metavar="OTHER", help="Name the tensors that differ from this one's; exit code 6 if any."
)
def command(settings: Settings, models: tuple[str, ...], **options: Any) -> None:
    """Show one hash of what a model, an adapter or a graph holds.

    It is the same wherever names, types, shapes and values of the tensors are: shards, order, metadata and the kind of file
    make no difference. Every byte is read. --json has the sha256 of every tensor, too.

    \b
    Examples:
      surgery fingerprint llama/
      surgery fingerprint llama/ copy-in-shards/
      surgery fingerprint merged/ --against llama/
    """
    from surgery.verbs.fingerprint import fingerprint

    with bar(settings, "reading") as progress:
        result = fingerprint(models, progress=progress, **options)
    show_result("fingerprint", result, settings, data=True)
    if result.against is not None and not result.equal:
        raise click.exceptions.Exit(_FINDINGS)
