# SPDX-License-Identifier: Apache-2.0
"""``surgery apply``."""

from __future__ import annotations

from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_result
from surgery_cli.pages import pages
from surgery_cli.progress import bar
from surgery_formats.text import show

__all__ = ["command"]


def _named(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    named = {}
    for text in values:
        name, equals, reference = text.partition("=")
        if not (equals and name and reference):
            raise click.BadParameter(f"'{show(text)}' is not NAME=PATH")
        named[name] = reference
    return named


@subcommand("apply")
@pages()
@click.argument("recipe", metavar="RECIPE", shell_complete=complete_files)
@option.path("-o", "--output", metavar="OUT", help="Of the last step.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    callback=_named,
    metavar="NAME=PATH",
    help="Where an input lies; may be repeated.",
)
@option.dry_run("Check the recipe, and show what would be written where.")
@option.overwrite("an output")
def command(settings: Settings, recipe: str, dry_run: bool, **options: Any) -> None:
    """Apply a recipe: several commands in one.

    RECIPE is a YAML file, or the surgery_manifest.json of an OUT, whose inputs are checked and whose bytes come out again.
    What only a later step reads is not written where plans allow it.

    \b
    Examples:
      surgery apply recipe.yaml
      surgery apply recipe.yaml --dry-run
      surgery apply merged/surgery_manifest.json -o again/ --input base=llama/
    """
    from surgery.verbs.apply import apply

    with bar(settings, "applying") as progress:
        result = apply(recipe, dry_run=dry_run, progress=progress, **options)
    show_result("apply", result, settings, data=dry_run)
