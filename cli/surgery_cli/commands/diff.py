# SPDX-License-Identifier: Apache-2.0
"""``surgery diff``."""

from __future__ import annotations

from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, number, subcommand
from surgery_cli.output import show_result
from surgery_cli.pages import pages
from surgery_cli.progress import bar

__all__ = ["FINDINGS", "command"]

FINDINGS = 6
"""Exit code: the comparison worked, and found what ``--fail-on`` names."""


@subcommand("diff")
@pages()
@click.argument("a", metavar="A", shell_complete=complete_files)
@click.argument("b", metavar="B", shell_complete=complete_files)
@click.option("--header", is_flag=True, help="Names, types and shapes alone; no value is read.")
@click.option("--spectrum", is_flag=True, help="Of models: how each difference spreads over directions.")
@click.option(
    "--intruders", is_flag=True, help="Of models: count B's strong directions that resemble none of A's; hours for 7 B."
)
@click.option(
    "--tolerance",
    type=number(least=0),
    metavar="X",
    help="Relative difference that counts as none; default: 0 for models, 1e-6 for adapters.",
)
@option.reference(
    "--base",
    metavar="BASE",
    help="Of adapters: the model they were trained on, where they name its weights differently.",
)
@click.option(
    "--fail-on",
    type=click.Choice(["any", "structure"]),
    help="End with exit code 6 on any difference, or on one of names, types or shapes.",
)
def command(settings: Settings, a: str, b: str, fail_on: str | None, **options: Any) -> None:
    """Show what differs between two models, two adapters or two ONNX graphs.

    Models are compared tensor by tensor. Graphs are compared by nodes, inputs and tensors, which are told by their values
    where names differ; one of the two may be the model that the graph was exported from. Adapters are compared by what
    they add to each weight, whatever their format, rank and factors: no delta is formed, and no base is needed unless
    they spell its weights in two ways.

    \b
    Examples:
      surgery diff base/ tuned/
      surgery diff my-lora/ my-lora.safetensors
      surgery diff kohya.safetensors diffusers.safetensors --base flux/
      surgery diff exported/model.onnx other.onnx
      surgery diff base/ merged/ --fail-on structure --header
    """
    from surgery.verbs.diff import diff

    with bar(settings, "comparing") as progress:
        result = diff(a, b, progress=progress, **options)
    show_result("diff", result, settings, data=True)
    if (fail_on == "any" and not result.equal) or (fail_on == "structure" and not result.same_structure):
        raise click.exceptions.Exit(FINDINGS)
