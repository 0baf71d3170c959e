# SPDX-License-Identifier: Apache-2.0
"""``surgery verify``."""

from __future__ import annotations

import math

import click

from surgery_cli.options import Settings, complete_files, weighted
from surgery_cli.options import command as sub_command
from surgery_cli.output import emit_json, pairs, warn

__all__ = ["command"]


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise click.BadParameter("it is a number above 0")
    return value


@sub_command("verify")
@click.argument("output", metavar="OUT", shell_complete=complete_files)
@click.option(
    "--against", metavar="BASE", shell_complete=complete_files, help="Compare with this base what came of it."
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=weighted,
    metavar="ADAPTER[=WEIGHT]",
    shell_complete=complete_files,
    help="With --against: a graph must compute the merge of these; may be given several times.",
)
@click.option(
    "--tolerance",
    type=_tolerance,
    metavar="X",
    help="Greatest difference of a logit, relative to the greatest logit; default: 1e-4, 1e-2 for graphs of 16 bits.",
)
def command(
    settings: Settings,
    output: str,
    against: str | None,
    adapters: tuple[tuple[str, float], ...],
    tolerance: float | None,
) -> None:
    """Verify an output: its bytes, and what a graph computes.

    A folder of weights is compared with what its manifest recorded. A graph is run on the CPU in fp32 (prefill, decode steps, a padded
    batch, greedy tokens) and compared with a reference computed from config.json and weights by arithmetic that shares nothing with the
    exporter's. Whatever is not as it was meant ends with exit code 5.

    \b
    Examples:
      surgery verify merged/
      surgery verify out/ --against llama/
      surgery verify out/ --against llama/ --adapter my-lora=0.7
    """
    from surgery.verbs.verify import verify
    from surgery_formats.refs import resolve

    found = verify(
        resolve(output),
        against=None if against is None else resolve(against),
        adapters=[(resolve(path), weight) for path, weight in adapters],
        tolerance=tolerance,
    )
    if settings.json:
        emit_json("verify", found.as_json())
    elif not settings.quiet:
        pairs([(check.name, check.detail) for check in found.checks])
    for text in found.notes:
        warn(text)
