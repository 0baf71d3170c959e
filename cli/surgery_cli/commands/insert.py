# SPDX-License-Identifier: Apache-2.0
"""``surgery insert``."""

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

_KINDS = (
    "lora", "dora", "rslora", "ia3", "loha", "lokr", "oft", "vera", "bottleneck", "prompt", "prefix",
)  # fmt: skip
_OF_FRESH = ("rank", "alpha", "targets", "text", "calibration", "release", "residual", "format")


@subcommand("insert")
@pages()
@click.argument("model", shell_complete=complete_files)
@click.argument("what", nargs=-1, type=option.weighted, metavar="[WHAT[=WEIGHT]]...", shell_complete=complete_files)
@option.reference("--base", metavar="BASE", help="Of an .onnx file: the checkpoint that it was made of.")
@option.output("Folder to make; it must not exist yet.")
@click.option(
    "--required",
    is_flag=True,
    help="Of an .onnx file: new inputs have no default, for runtimes that pass no optional ones.",
)
@click.option(
    "--gated", is_flag=True, help="Of an .onnx file: put adapters inside, each with an input for its strength."
)
@click.option(
    "--unmerged", is_flag=True, help="Put adapters beside MODEL in one folder, where transformers and PEFT load them."
)
@click.option("--new", type=click.Choice(_KINDS), help="Begin an adapter of this kind for MODEL, in the place of WHAT.")
@click.option(
    "--rank",
    type=option.count(),
    metavar="N",
    help="Of --new: directions of a module; side of a block of an OFT; width of a bottleneck; virtual tokens.  [default: 16]",
)
@click.option(
    "--alpha", type=option.number(above=0), metavar="NUMBER", help="Of --new: lora_alpha; by default the rank."
)
@click.option(
    "--targets",
    metavar="attention|mlp|all|PATTERN[,...]",
    help="Of --new: linear modules by role, or by name: 'q_proj,v_proj', 'layers.[01].*'.  [default: attention]",
)
@option.choice(
    "--init",
    values=("default", "pissa", "olora", "orthogonal", "eva", "loftq", "text"),
    help="Of --new: how it begins; all but prompts begin as MODEL.",
)
@click.option("--text", metavar="TEXT", help="What a prompt begins as; --init text needs it.")
@option.path("--calibration", metavar="FILE", help="Of eva: inputs of the modules.")
@option.reference("--release", metavar="RELEASE", help="Of loftq: the unquantised model that MODEL was made of.")
@option.path(
    "--residual",
    metavar="OUT_BASE",
    help="Of pissa and olora: folder to make, MODEL without what the factors begin with.",
)
@click.option("--seed", type=option.count(0), default=0, show_default=True, help="Of everything random.")
@click.option(
    "--format",
    type=click.Choice(["peft", "adapterhub", "mlx"]),
    help="Of --new.  [default: peft; of a bottleneck adapterhub]",
)
@option.threads("--workers", help="Computing threads; by default one per core, at most 8.")
@option.dry_run("Show what would be done; write nothing.")
@option.overwrite()
def command(
    settings: Settings,
    model: str,
    what: tuple[tuple[str, float], ...],
    output: Path | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Insert trained tensors or adapters into a model or graph; begin new ones.

    WHAT holds tensors that a fine-tune changed, as 'extract-lora' writes them: biases, norms, layers, token rows. OUT gets
    MODEL's files with these in the place of its own, to the byte, and is told which share of the model was trained.

    With an .onnx file as MODEL, whoever made it, WHAT are adapters: the graph gets slots beside the nodes that use the weights
    they were trained for, and each adapter becomes a file for the slots. The weights are found by their values in --base.

    With --new OUT is an adapter that nobody has trained yet, ready for PEFT, AdapterHub's library or mlx-lm, with what it
    trains, what that takes in memory, and what it saves.

    \b
    Examples:
      surgery insert llama/ bitfit-delta/ -o tuned/
      surgery insert llama/ style-lora/ facts-lora/ --unmerged -o with-adapters/
      surgery insert llama/ --new lora --rank 16 --targets all -o fresh/
      surgery insert llama/ --new lora --init pissa --residual llama-residual/ -o fresh/
      surgery insert llama-nf4/ --new lora --init loftq --release llama/ -o fresh/
      surgery insert llama/ --new prompt --rank 20 --text "Classify the sentiment:" -o prompt/
      surgery insert model.onnx sql-lora/ chat-lora/ --base llama/ -o with-slots/
      surgery insert model.onnx style=0.7 facts=0 --base llama/ --gated -o with-strengths/
    """
    from surgery.verbs.insert import insert

    if bool(what) == (options["new"] is not None):
        raise click.UsageError(f"give either WHAT to insert, or --new KIND to begin{', not both' if what else ''}")
    if what and (given := [name for name in _OF_FRESH if options[name] is not None]):
        raise click.UsageError(f"--{given[0]} belongs to --new")
    if options["init"] == "text" and options["text"] is None:
        raise click.UsageError("--init text needs --text")
    with bar(settings, "inserting") as progress:
        result = insert(model, what or None, output=output, dry_run=dry_run, progress=progress, **options)
    show_output("insert", result, settings, output)
