# SPDX-License-Identifier: Apache-2.0
"""``surgery report``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_result

__all__ = ["command"]


@subcommand("report")
@click.argument("references", nargs=-1, required=True, metavar="REF...", shell_complete=complete_files)
@option.reference("--base", metavar="BASE", help="The model the adapters were trained on.")
@option.reference(
    "--other-base", metavar="OTHER", help="The same model, quantised or not, or nf4: which base was it trained on?"
)
@click.option(
    "--tasks",
    type=option.count(),
    multiple=True,
    default=(1, 10, 100),
    show_default=True,
    help="Numbers of tasks to compare; may be repeated.",
)
@option.path("--md", "markdown", metavar="FILE", help="Write it as Markdown too.")
@option.overwrite("FILE")
def command(
    settings: Settings, references: tuple[str, ...], markdown: Path | None, overwrite: bool, **options: Any
) -> None:
    """Report what adapters save in parameters and storage.

    Trained share of the parameters, bytes against a full copy, N tasks on one base against N copies, and what the
    numbers are part of. Only headers are read, unless two bases are compared.

    \b
    Examples:
      surgery report my-lora/ --base llama/
      surgery report my-lora/ --base llama/ --other-base llama-bnb-4bit/
      surgery report llama/ lora-a/ lora-b/ --md savings.md
    """
    from surgery.reports.sections import Note
    from surgery.reports.values import Name
    from surgery.verbs.report import report
    from surgery_formats.files.output.single import write_single

    result = report(references, **options)
    summary = result.summary()
    if markdown is not None:
        other = options["other_base"]
        inputs = tuple(cost.path for cost in (result.base, *result.adapters) if cost is not None)
        inputs += (Path(other),) if other and Path(other).exists() else ()
        data = summary.as_markdown().encode()
        job = hashlib.sha256(data).hexdigest()
        write_single(markdown, job, len(data), lambda file: file.pwrite(data, 0), overwrite=overwrite, inputs=inputs)
        summary = summary.plus(Note(("wrote ", Name(markdown, 500))))
    show_result("report", result, settings, summary=summary, data=True)
