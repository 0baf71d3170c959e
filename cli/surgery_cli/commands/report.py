# SPDX-License-Identifier: Apache-2.0
"""``surgery report``."""

from __future__ import annotations

from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_result
from surgery_cli.pages import pages

__all__ = ["command"]


@subcommand("report")
@pages("md")
@click.argument("references", nargs=-1, required=True, metavar="REF...", shell_complete=complete_files)
@option.reference("--base", metavar="BASE", help="The model the adapters were trained on.")
@option.reference(
    "--other-base", metavar="OTHER", help="The same model, quantised or not, or nf4: which base was it trained on?"
)
@click.option(
    "--tasks",
    type=option.count(),
    multiple=True,
    help="Numbers of tasks to compare, by default 1, 10 and 100; needs the base; may be repeated.",
)
def command(settings: Settings, references: tuple[str, ...], tasks: tuple[int, ...], **options: Any) -> None:
    """Report what adapters save in parameters and storage.

    Trained share of the parameters, bytes against a full copy, N tasks on one base against N copies, and what the
    numbers are part of. Only headers are read, unless two bases are compared.

    \b
    Examples:
      surgery report my-lora/ --base llama/
      surgery report my-lora/ --base llama/ --other-base llama-bnb-4bit/
      surgery report llama/ lora-a/ lora-b/ --html savings.html
    """
    from surgery.verbs.report import report

    show_result("report", report(references, tasks=tasks or None, **options), settings, data=True)
