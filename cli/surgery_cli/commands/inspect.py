# SPDX-License-Identifier: Apache-2.0
"""``surgery inspect``."""

from __future__ import annotations

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_result
from surgery_cli.pages import pages

__all__ = ["command"]


@subcommand("inspect")
@pages()
@click.argument("reference", metavar="REF", shell_complete=complete_files)
@click.option("--depth", type=option.count(), default=4, show_default=True, help="Levels of modules.")
@click.option("--all", "every", is_flag=True, help="Every level; of an adapter every parameter and all metadata.")
@click.option(
    "--spectrum", is_flag=True, help="Of an adapter: read its values, for norms and spectra; --html does too."
)
@option.alpha
def command(settings: Settings, reference: str, depth: int, every: bool, spectrum: bool, alpha: float | None) -> None:
    """Show what a model, an adapter or an ONNX graph is made of.

    Of a model: its modules with role, shape, parameters, type and bytes; equal layers are shown once. Of an adapter:
    format, kind, rank, alpha, scale, what it touches, and what makes it easy to use wrongly. Of a graph: operators,
    inputs with their dims, slots, weights by module, files, and what stands against running it. Only headers are read, but for --spectrum.

    \b
    Examples:
      surgery inspect llama/
      surgery inspect my-lora/ --all
      surgery inspect exported/model.onnx
      surgery inspect llama/ --json | jq .result.parameters
    """
    from surgery.verbs.inspect import AdapterReport, ArrayFileReport, inspect

    drawn = settings.pages is not None and "html" in settings.pages.files
    report = inspect(option.told_alpha(reference, alpha), spectrum=spectrum or drawn)
    verbose = every or settings.verbose > 0
    cut = {} if isinstance(report, AdapterReport | ArrayFileReport) else {"depth": depth}
    show_result("inspect", report, settings, summary=report.summary(verbose=verbose, **cut), data=True)
