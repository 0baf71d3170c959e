# SPDX-License-Identifier: Apache-2.0
"""``surgery insert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_output
from surgery_cli.progress import bar

__all__ = ["command"]


@subcommand("insert")
@click.argument("base", shell_complete=complete_files)
@click.argument("what", required=False, shell_complete=complete_files)
@option.output("Folder to make; it must not exist yet.")
@click.option("--workers", type=click.IntRange(min=1), help="Computing threads; by default one per core, at most 8.")
@option.dry_run("Show what would be done; write nothing.")
@option.overwrite()
def command(
    settings: Settings, base: str, what: str | None, output: Path | None, dry_run: bool, **options: Any
) -> None:
    """Put into a model, or beside it, what trains or was trained.

    WHAT holds tensors that a fine-tune changed, as 'extract-lora' writes them: biases, norms, layers, token rows. OUT gets
    BASE's files with these in the place of its own, to the byte, and is told which share of the model was trained.

    \b
    Examples:
      surgery insert llama/ bitfit-delta/ -o tuned/
    """
    from surgery.verbs.insert import insert

    with bar(settings, "inserting") as progress:
        result = insert(base, what, output=output, dry_run=dry_run, progress=progress, **options)
    show_output("insert", result, settings, output)
