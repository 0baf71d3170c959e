# SPDX-License-Identifier: Apache-2.0
"""``surgery locate``."""

from __future__ import annotations

from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand, weighted
from surgery_cli.output import show_result
from surgery_cli.pages import pages

__all__ = ["command"]


@subcommand("locate")
@pages()
@click.argument("graph", metavar="GRAPH", shell_complete=complete_files)
@click.option(
    "--base", required=True, metavar="BASE", shell_complete=complete_files, help="The checkpoint the graph was made of."
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=weighted,
    metavar="ADAPTER[=WEIGHT]",
    shell_complete=complete_files,
    help="What was merged into BASE before; may be given several times.",
)
@option.threads("--workers", help="Comparing threads; by default one per core, at most 8.")
def command(settings: Settings, graph: str, base: str, **options: Any) -> None:
    """Find a checkpoint's weights in an ONNX graph.

    GRAPH is an .onnx file of any exporter, or a folder with one. Its tensors are told by their values, whatever their names:
    weights as they are, transposed, packed, sliced, in another order or type, scaled, folded with a norm, or as codes. All
    of each is compared with BASE.

    \b
    Examples:
      surgery locate model.onnx --base llama/
      surgery locate model.onnx --base llama/ --verbose
      surgery locate merged.onnx --base llama/ --adapter my-lora=0.7
    """
    from surgery.verbs.locate import locate

    show_result("locate", locate(graph, base, **options), settings)
