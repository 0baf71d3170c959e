# SPDX-License-Identifier: Apache-2.0
"""``surgery unmerge``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_result
from surgery_cli.progress import bar

__all__ = ["command"]


@subcommand("unmerge")
@click.argument("merged", shell_complete=complete_files)
@option.adapters()
@option.output("Folder to make; it must not exist yet.")
@click.option(
    "--base-rounding",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What 'merge --reversible' kept; default: MERGED/base.rounding, if it is there.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Computing threads, or processes for much; by default one per core, at most 8 threads or 16 processes.",
)
@option.dry_run("Show what would be done; write nothing.")
@option.overwrite()
def command(
    settings: Settings, merged: str, adapters: tuple[tuple[str, float], ...], dry_run: bool, **options: Any
) -> None:
    """Take a merge back.

    MERGED is a model that adapters were merged into; each ADAPTER is named as it was then, in the same order and with the
    same weight. OUT gets the base: bit for bit if the merge was reversible, else the best estimate.

    \b
    Examples:
      surgery merge llama/ my-lora/ -o merged/ --reversible
      surgery unmerge merged/ my-lora/ -o llama-again/
      surgery unmerge merged/ style=0.7 facts=0.5 -o base/ --base-rounding base.rounding
    """
    from surgery.verbs.unmerge import unmerge

    with bar(settings, "unmerging") as progress:
        result = unmerge(merged, adapters, dry_run=dry_run, progress=progress, **options)
    show_result("unmerge", result, settings, data=dry_run)
