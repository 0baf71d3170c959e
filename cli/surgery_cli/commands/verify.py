# SPDX-License-Identifier: Apache-2.0
"""``surgery verify``."""

from __future__ import annotations

from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, number, subcommand, weighted
from surgery_cli.output import show_result
from surgery_cli.pages import pages

__all__ = ["command"]


def some_or_all(text: str) -> int | str:
    """A number, or ``all``."""
    if text == "all":
        return text
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < 1:
        raise click.BadParameter("a number above 0, or all")
    return int(text)


@subcommand("verify")
@pages()
@click.argument("output", metavar="OUT", shell_complete=complete_files)
@option.reference("--against", metavar="BASE", help="Compare with this base what came of it.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=weighted,
    metavar="ADAPTER[=WEIGHT]",
    shell_complete=complete_files,
    help="With --against: the output must be the merge of these; may be given several times.",
)
@click.option(
    "--recompute",
    type=some_or_all,
    metavar="N|all",
    help="With --adapter, of a folder of weights: how many of them are computed once more; default: 8.",
)
@click.option(
    "--tolerance",
    type=number(above=0),
    metavar="X",
    help="Greatest difference of a logit, relative to the greatest logit; default: 1e-4, 1e-2 for graphs of 16 bits.",
)
@click.option(
    "--text",
    metavar="FILE|words",
    shell_complete=complete_files,
    help="With --against: the error of a graph's logits on this text, to those of BASE with the adapters.",
)
def command(settings: Settings, output: str, **options: Any) -> None:
    """Verify an output: its bytes, and what a graph computes.

    A folder of weights is compared with what its manifest recorded. A graph is run on the CPU in fp32 (prefill, decode
    steps, a padded batch, greedy tokens) and compared with a reference computed from config.json and weights by
    arithmetic that shares nothing with the exporter's. Whatever is not as it was meant ends with exit code 5.

    \b
    Examples:
      surgery verify merged/
      surgery verify out/ --against llama/
      surgery verify out/ --against llama/ --adapter my-lora=0.7
      surgery verify out/ --against llama/ --text words.txt
    """
    from surgery.verbs.verify import verify

    show_result("verify", verify(output, **options), settings)
