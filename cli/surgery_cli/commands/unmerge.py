# SPDX-License-Identifier: Apache-2.0
"""``surgery unmerge``."""

from __future__ import annotations

from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_result
from surgery_cli.pages import pages
from surgery_cli.progress import bar

__all__ = ["command"]


@subcommand("unmerge")
@pages()
@click.argument("model", shell_complete=complete_files)
@option.adapters(required=False, metavar="ADAPTER[=WEIGHT]...")  # the verb knows which they are
@option.output("Folder to make; it must not exist yet.")
@option.path(
    "--base-rounding",
    metavar="FILE",
    help="What 'merge --reversible' kept; default: MODEL/base.rounding, if it is there.",
)
@click.option("--rank", type=option.count(), help="Of two models: the rank of the LoRA; by default it is found.")
@option.threads("--workers", help="Computing threads; by default one per core, at most 8.")
@option.dry_run("Show what would be done; write nothing.")
@option.overwrite()
def command(
    settings: Settings, model: str, adapters: tuple[tuple[str, float], ...], dry_run: bool, **options: Any
) -> None:
    """Take a merge back.

    MODEL is one that adapters were merged into; each ADAPTER is named as it was then, in the same order and with the same
    weight. OUT gets the base: bit for bit if the merge was reversible, else the best estimate.

    With a base as MODEL and its merge in the place of ADAPTER, OUT gets the LoRA, beyond the rounding of the merge.

    \b
    Examples:
      surgery merge llama/ my-lora/ -o merged/ --reversible
      surgery unmerge merged/ my-lora/ -o llama-again/
      surgery unmerge merged/ style=0.7 facts=0.5 -o base/ --base-rounding base.rounding
      surgery unmerge llama/ merged/ -o the-lora/
    """
    from surgery.verbs.unmerge import unmerge

    with bar(settings, "unmerging") as progress:
        result = unmerge(model, adapters, dry_run=dry_run, progress=progress, **options)
    show_result("unmerge", result, settings, data=dry_run)
