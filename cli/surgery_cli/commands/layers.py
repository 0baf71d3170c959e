# SPDX-License-Identifier: Apache-2.0
"""``surgery layers``."""

from __future__ import annotations

from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_result
from surgery_cli.pages import pages
from surgery_cli.progress import bar

__all__ = ["command"]

_PROJECTIONS = click.Choice(["qkv", "gate-up"])


@subcommand("layers")
@pages()
@click.argument("base", shell_complete=complete_files)
@option.output("Folder to make; it must not exist yet.")
@click.option("--keep", metavar="LAYERS", help="Layers of OUT in their order, e.g. 0-19,24-31; the first is 0.")
@click.option("--repeat", metavar="LAYERS", help="Ranges to have once more behind themselves; 8-15x3: three times.")
@click.option("--drop", metavar="LAYERS", help="Layers to leave out.")
@click.option("--vocab", metavar="trim[=FILE]|pad=N", help="Rows: the tokenizer's, those of a list of ids, a multiple.")
@click.option("--split", multiple=True, type=_PROJECTIONS, help="Part fused projections; may be repeated.")
@click.option("--fuse", multiple=True, type=_PROJECTIONS, help="Join projections; may be repeated.")
@option.dtype
@option.reference("--adapter", metavar="ADAPTER", help="An adapter of BASE, to be moved with its layers.")
@option.path("--adapter-output", "--adapter-out", metavar="OUT", help="Where to write that.")
@click.option(
    "--shard-size", type=option.size, metavar="SIZE", help="Most bytes per weight file, e.g. 5GB; default: as BASE."
)
@option.threads("--workers", help="Computing threads; by default one per core, at most 8.")
@option.verify("full: compare what was copied byte by byte too, and note the sha256 of every file.")
@option.dry_run("Show what would be done; write nothing.")
@option.overwrite()
def command(settings: Settings, base: str, dry_run: bool, **options: Any) -> None:
    """Write a model with other layers, projections or rows.

    What stays is copied, not computed; config.json, ties, shards and an adapter follow. A network whose config.json could
    not be true of the result is refused.

    \b
    Examples:
      surgery layers llama/ --keep 0-19,24-31 -o pruned/
      surgery layers llama/ --repeat 8-15 -o deeper/ --adapter lora/ --adapter-out lora-for-deeper/
      surgery layers llama/ --drop 20-23 -o pruned/ --dry-run
      surgery layers phi-3/ --split qkv --split gate-up -o as-llama/
      surgery layers llama/ --vocab pad=64 -o padded/
    """
    from surgery.verbs.layers import layers

    with bar(settings, "writing") as progress:
        result = layers(base, dry_run=dry_run, progress=progress, **options)
    show_result("layers", result, settings, data=dry_run)
