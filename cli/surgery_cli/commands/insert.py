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

_KINDS = (
    "lora", "dora", "rslora", "ia3", "loha", "lokr", "oft", "vera", "bottleneck", "prompt", "prefix",
)  # fmt: skip
_OF_FRESH = ("rank", "alpha", "targets", "text", "calibration", "release", "residual", "format")


@subcommand("insert")
@click.argument("base", shell_complete=complete_files)
@click.argument("what", required=False, shell_complete=complete_files)
@option.output("Folder to make; it must not exist yet.")
@click.option("--new", type=click.Choice(_KINDS), help="Begin an adapter of this kind, in the place of WHAT.")
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="Directions of a module; side of a block of an OFT; width of a bottleneck; virtual tokens.  [default: 16]",
)
@click.option("--alpha", type=option.number(above=0), metavar="NUMBER", help="lora_alpha; by default the rank.")
@click.option(
    "--targets",
    metavar="attention|mlp|all|PATTERN[,...]",
    help="Linear modules it is for: by role, or by name: 'q_proj,v_proj', 'layers.[01].*'.  [default: attention]",
)
@option.choice(
    "--init",
    values=("default", "pissa", "olora", "orthogonal", "eva", "loftq", "text"),
    help="How it begins; all but prompts begin as BASE.",
)
@click.option("--text", metavar="TEXT", help="What a prompt begins as; --init text needs it.")
@click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE", help="Of eva: inputs of the modules.")
@option.reference("--release", metavar="MODEL", help="Of loftq: the unquantised model that BASE was made of.")
@click.option(
    "--residual",
    type=click.Path(path_type=Path),
    metavar="OUT_BASE",
    help="Of pissa and olora: folder to make, BASE without what the factors begin with.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything random.")
@click.option(
    "--format",
    type=click.Choice(["peft", "adapterhub", "mlx"]),
    help="Of the adapter.  [default: peft; of a bottleneck adapterhub]",
)
@click.option("--workers", type=click.IntRange(min=1), help="Computing threads; by default one per core, at most 8.")
@option.dry_run("Show what would be done, and what training it takes; write nothing.")
@option.overwrite()
def command(
    settings: Settings, base: str, what: str | None, output: Path | None, dry_run: bool, **options: Any
) -> None:
    """Put into a model, or beside it, what trains or was trained.

    WHAT holds tensors that a fine-tune changed, as 'extract-lora' writes them: biases, norms, layers, token rows. OUT gets
    BASE's files with these in the place of its own, to the byte, and the share of the model that was trained is told.

    With --new OUT is an adapter that nobody has trained yet, ready for PEFT, AdapterHub's library or mlx-lm, with what it
    trains, what that takes in memory, and what it saves.

    \b
    Examples:
      surgery insert llama/ bitfit-delta/ -o tuned/
      surgery insert llama/ --new lora --rank 16 --targets all -o fresh/
      surgery insert llama/ --new lora --init pissa --residual llama-residual/ -o fresh/
      surgery insert llama-nf4/ --new lora --init loftq --release llama/ -o fresh/
      surgery insert llama/ --new prompt --rank 20 --text "Classify the sentiment:" -o prompt/
    """
    from surgery.verbs.insert import insert

    if (what is None) == (options["new"] is None):
        raise click.UsageError(
            "give WHAT to insert, or --new KIND to begin an adapter" + (", not both" if what else "")
        )
    given = [name for name in _OF_FRESH if options[name] is not None]
    if what is not None and given:
        raise click.UsageError(f"--{given[0]} belongs to --new")
    if options["init"] == "text" and options["text"] is None:
        raise click.UsageError("--init text needs --text")
    with bar(settings, "inserting") as progress:
        result = insert(base, what, output=output, dry_run=dry_run, progress=progress, **options)
    show_output("insert", result, settings, output)
