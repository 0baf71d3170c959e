# SPDX-License-Identifier: Apache-2.0
"""``surgery strip``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_output
from surgery_cli.pages import pages

__all__ = ["command"]


@subcommand("strip")
@pages()
@click.argument("model", type=option.PATH, shell_complete=complete_files)
@option.output("Folder to make; it must not exist yet.")
@click.option("--all-metadata", is_flag=True, help="All metadata and documentation of nodes, names of modules too.")
@option.dry_run("Say what would be taken out; write nothing.")
@option.overwrite()
def command(settings: Settings, model: Path, output: Path | None, **options: Any) -> None:
    """Take the exporting machine's paths and lines of source out of an ONNX graph.

    torch's exporter writes the lines of source of every node into the graph, with paths of the machine. MODEL is an .onnx
    file or a folder with one; nodes and weights stay as they are, and files of weights are copied.

    \b
    Examples:
      surgery strip exported/model.onnx -o clean/
      surgery strip exported/ -o clean/ --all-metadata
    """
    from surgery.verbs.strip import strip

    show_output("strip", strip(model, output=output, **options), settings, output)
