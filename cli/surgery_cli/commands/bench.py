# SPDX-License-Identifier: Apache-2.0
"""``surgery bench``."""

from __future__ import annotations

from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, runtime_device_option, subcommand
from surgery_cli.output import show_result
from surgery_cli.pages import pages

__all__ = ["command"]


@subcommand("bench")
@pages()
@click.argument("model", shell_complete=complete_files)
@option.reference("--against", metavar="OTHER", help="Another graph, measured in turns with MODEL.")
@click.option("--prompt-length", type=option.count(), help="Tokens of a row; by default 512, or what fits.")
@click.option("--new-tokens", type=option.count(0), default=100, show_default=True, help="Steps to measure.")
@click.option("--batch", type=option.count(), default=1, show_default=True, help="Rows.")
@click.option("--cache", type=option.count(), metavar="TOKENS", help="Size of a shared cache; default: as needed.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="FILE",
    help=".onnx_adapter for the slots of MODEL, or NAME of one exported with it, at a strength: FILE=0.5; not for OTHER.",
)
@click.option("--no-cuda-graph", is_flag=True, help="Launch every step anew instead of replaying a recording.")
@option.threads("--threads", help="On the cpu; by default one per core.")
@runtime_device_option
def command(settings: Settings, model: str, against: str | None, no_cuda_graph: bool, **options: Any) -> None:
    """Measure an exported model: load, prefill, time per token, memory.

    Medians over random tokens. With --against both graphs are measured in turns, so that a busy machine hurts both
    alike. On CUDA the floor is measured too: the time to read the weights of a step once. Graphs of other exporters can
    be measured if their inputs have the usual names.

    \b
    Examples:
      surgery bench out/
      surgery bench merged/ --against base/ --new-tokens 200
      surgery bench out/ --device cuda --batch 8
      surgery bench out/ --adapter sql --against out/    # what an adapter in slots takes
    """
    from surgery.verbs.bench import bench

    result = bench(model, against, cuda_graph=not no_cuda_graph, **options)
    show_result("bench", result, settings, data=True)
