# SPDX-License-Identifier: Apache-2.0
"""``surgery report``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery_cli.options import Settings, complete_files, overwrite_option
from surgery_cli.options import command as sub_command
from surgery_cli.output import emit_json, note, pairs, table, warn
from surgery_formats.text import count, nbytes, show

if TYPE_CHECKING:
    from surgery.verbs.report import SavingsReport, Split, TaskCost

__all__ = ["command"]


@sub_command("report")
@click.argument("references", nargs=-1, required=True, metavar="REF...", shell_complete=complete_files)
@click.option("--base", metavar="BASE", shell_complete=complete_files, help="The model the adapters were trained on.")
@click.option(
    "--tasks",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 10, 100),
    show_default=True,
    help="Numbers of tasks to compare; may be repeated.",
)
@click.option("--md", "markdown", metavar="FILE", type=click.Path(path_type=Path), help="Write it as Markdown too.")
@overwrite_option("FILE")
def command(
    settings: Settings,
    references: tuple[str, ...],
    base: str | None,
    tasks: tuple[int, ...],
    markdown: Path | None,
    overwrite: bool,
) -> None:
    """Report what adapters save in parameters and storage.

    Trained share of the parameters, bytes against a full copy, N tasks on one base against N copies, and what the numbers are
    part of. Only headers are read.

    \b
    Examples:
      surgery report my-lora/ --base llama/
      surgery report llama/ lora-a/ lora-b/ --md savings.md
    """
    from surgery.verbs.report import report
    from surgery_formats.refs import resolve

    paths = [resolve(reference) for reference in references]
    model = None if base is None else resolve(base)
    found = report(paths, base=model, tasks=tasks)
    if markdown is not None:
        _write(found.as_markdown(), markdown, paths, overwrite)
    if settings.json:
        emit_json("report", found.as_json())
    else:
        _text(found)
        if markdown is not None and not settings.quiet:
            note(f"wrote {show(markdown, 500)}")
    for cost in found.adapters:
        for text in cost.warnings:
            warn(f"{show(cost.name)}: {text}")


def _write(text: str, path: Path, inputs: list[Path], overwrite: bool) -> None:
    from surgery_formats.files.output.single import write_single

    data = text.encode()
    job = hashlib.sha256(data).hexdigest()
    write_single(path, job, len(data), lambda file: file.pwrite(data, 0), overwrite=overwrite, inputs=tuple(inputs))


def _text(found: SavingsReport) -> None:
    if found.base is not None:
        sizes = f"{count(found.base.parameters)} parameters, {nbytes(found.base.nbytes)}"
        pairs([("base", f"{show(found.base.name)}: {sizes}")])
        click.echo()
    if found.adapters:
        table(
            ("adapter", "kind", "trained", "share", "bytes", "of a copy"),
            (
                (
                    cost.name,
                    f"{cost.format} {cost.kind}",
                    count(cost.trained),
                    _percent(cost.share),
                    nbytes(cost.nbytes),
                    _percent(cost.nbytes_share),
                )
                for cost in found.adapters
            ),
            right=(2, 3, 4, 5),
        )
        click.echo()
    splits = [(found.base.name, found.base.split, found.base.parameters)] if found.base else []
    splits += [(cost.name, cost.split, cost.trained) for cost in found.adapters]
    table(("where", "attention", "MLP", "rest"), (_split(*entry) for entry in splits), right=(1, 2, 3))
    if rows := list(_tasks(found)):
        click.echo()
        headings = ("tasks", "with", "full copies", "one base and adapters", "saved", "times smaller")
        table(headings, rows, right=(0, 2, 3, 4, 5))


def _tasks(found: SavingsReport) -> Iterator[tuple[object, ...]]:
    for cost in found.adapters:
        for task in cost.tasks:
            yield _task(task, cost.name)
    if found.together is not None:
        yield _task(found.together, "these adapters together")


def _task(cost: TaskCost, name: str) -> tuple[object, ...]:
    sizes = (nbytes(cost.copies_nbytes), nbytes(cost.shared_nbytes), nbytes(cost.saved_nbytes))
    return (cost.tasks, name, *sizes, f"{cost.times:.3g}")


def _split(name: str, split: Split, total: int) -> tuple[str, ...]:
    parts = (split.attention, split.mlp, split.rest)
    return (name, *(f"{count(part)} ({part / total:.1%})" if total else "0" for part in parts))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.3%}"
