# SPDX-License-Identifier: Apache-2.0
"""``surgery resize``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_output
from surgery_cli.pages import pages
from surgery_cli.progress import bar

__all__ = ["command"]


@subcommand("resize")
@pages()
@click.argument("adapter", shell_complete=complete_files)
@option.output("Folder to make, or file where the format is a single file.")
@click.option("--rank", type=option.count(), help="Greatest rank of a module.")
@click.option("--energy", type=option.share, metavar="SHARE", help="Share of each module's energy to keep, e.g. .99.")
@click.option("--max-error", type=option.share, metavar="SHARE", help="Greatest relative error of a module, e.g. .05.")
@option.format_option("Format to write; by default ADAPTER's.")
@option.reference("--base", metavar="BASE", help="The model, if names come from it.")
@option.dtype
@option.dry_run("Show ranks and errors; write nothing.")
@option.overwrite()
def command(settings: Settings, adapter: str, output: Path | None, **options: Any) -> None:
    """Lower the rank of an adapter.

    Each module gets the best factors of its new rank; its error is shown. Ranks are never raised: that would add zeros.

    \b
    Examples:
      surgery resize my-lora/ -o small/ --rank 8
      surgery resize my-lora/ -o small/ --energy .99
      surgery resize my-lora/ -o small/ --max-error .05 --dry-run
    """
    from surgery.verbs.resize import resize

    if all(options[name] is None for name in ("rank", "energy", "max_error")):
        raise click.UsageError("give --rank, --energy or --max-error")
    rank = option.rank_of(**{name: options.pop(name) for name in ("rank", "energy", "max_error")})
    with bar(settings, "resizing") as progress:
        result = resize(adapter, output=output, rank=rank, progress=progress, **options)
    show_output("resize", result, settings, output)
