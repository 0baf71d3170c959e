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
@click.option("--workers", type=click.IntRange(min=1), help="Computing threads; by default one per core, at most 8.")
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
    """Put into a model, or beside it, what trains or was trained.

    WHAT holds tensors that a fine-tune changed, as 'extract-lora' writes them: biases, norms, layers, token rows. OUT gets
    MODEL's files with these in the place of its own, to the byte, and is told which share of the model was trained.

    With an .onnx file as MODEL, whoever made it, WHAT are adapters: the graph gets slots beside the nodes that use the weights
    they were trained for, and each adapter becomes a file for the slots. The weights are found by their values in --base.

    \b
    Examples:
      surgery insert llama/ bitfit-delta/ -o tuned/
      surgery insert model.onnx sql-lora/ chat-lora/ --base llama/ -o with-slots/
      surgery insert model.onnx style=0.7 facts=0 --base llama/ --gated -o with-strengths/
    """
    from surgery.verbs.insert import insert

    with bar(settings, "inserting") as progress:
        result = insert(model, what or None, output=output, dry_run=dry_run, progress=progress, **options)
    show_output("insert", result, settings, output)
