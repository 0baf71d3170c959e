# SPDX-License-Identifier: Apache-2.0
"""``surgery combine``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, subcommand
from surgery_cli.output import show_output
from surgery_cli.pages import pages
from surgery_cli.progress import bar

__all__ = ["command"]

_DENSE = ("ties", "dare-ties", "dare-linear", "magnitude-prune", "peft-ties", "peft-dare-ties")


@subcommand("combine")
@pages()
@option.adapters()
@option.output("Folder to make, or file where the format is a single file.")
@click.option("--rank", type=option.count(), help="Greatest rank; without it nothing is lost.")
@click.option("--energy", type=option.share, metavar="SHARE", help="Share of each module's energy to keep, e.g. .99.")
@option.choice(
    "--method",
    values=("exact", "svd", *_DENSE),
    help="How deltas are combined; all but exact and svd are approximate by design. peft-*: signs before weights.",
)
@click.option(
    "--density", type=option.share, metavar="SHARE", help="Share of the values TIES, DARE and pruning keep, e.g. .2."
)
@click.option("--seed", type=option.count(0), default=0, show_default=True, help="Of DARE's random drops.")
@click.option(
    "--majority",
    type=click.Choice(("total", "frequency")),
    help="What elects a sign in TIES: the values' total (the default), or how many have it.",
)
@click.option(
    "--only", multiple=True, metavar="PATTERN", help="Keep modules of this name alone: q_proj, 'layers.[01].*'."
)
@click.option(
    "--without", multiple=True, metavar="PATTERN", help="Leave modules of this name out. Both may be repeated."
)
@option.format_option("Format to write; by default the first adapter's.")
@option.reference("--base", metavar="BASE", help="The model, if names come from it.")
@option.dtype
@option.dry_run("Show ranks and errors; write nothing.")
@option.overwrite()
def command(settings: Settings, adapters: tuple[tuple[str, float], ...], output: Path | None, **options: Any) -> None:
    """Combine adapters into one.

    OUT does to a model what all ADAPTERs do together, each WEIGHT times: factors side by side, cut to the best of a
    lower rank if one is asked for. Weights may be negative; one ADAPTER alone is scaled. No model is needed. What was
    written is read back and compared.

    \b
    Examples:
      surgery combine style=0.7 facts=-0.3 -o both/
      surgery combine style/ facts/ -o both/ --rank 16
      surgery combine lora/ -o attention/ --only 'self_attn.*'
      surgery combine a/ b/ c/ -o merged/ --method ties --density .2 --rank 32
    """
    from surgery.verbs.combine import combine

    _check(options)
    rank = option.rank_of(options.pop("rank"), options.pop("energy"))
    with bar(settings, "combining") as progress:
        result = combine(adapters, output=output, rank=rank, progress=progress, **options)
    show_output("combine", result, settings, output)


def _check(options: dict[str, Any]) -> None:
    """Check the options before anything is read."""
    dense = options["method"] in _DENSE
    if dense and options["density"] is None:
        raise click.UsageError(
            f"--method {options['method']} needs --density, the share of the values to keep: --density .5"
        )
    if not dense and options["density"] is not None:
        raise click.UsageError(f"--method {options['method']} drops no values: --density has no meaning")
    if options["majority"] is not None and not options["method"].endswith("ties"):
        raise click.UsageError(f"--method {options['method']} elects no signs: --majority has no meaning")
    if dense and options["rank"] is None and options["energy"] is None:
        raise click.UsageError(f"what --method {options['method']} makes has full rank: give --rank or --energy")
