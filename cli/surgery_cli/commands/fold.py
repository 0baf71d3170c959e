# SPDX-License-Identifier: Apache-2.0
"""``surgery fold``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_output
from surgery_cli.pages import pages
from surgery_cli.progress import bar

__all__ = ["command"]


@subcommand("fold")
@pages()
@click.argument("model", type=option.PATH, shell_complete=complete_files)
@option.adapters(required=False)
@option.output("Folder to make; it must not exist yet.")
@option.dry_run("Say what would be folded; write nothing.")
@option.overwrite()
def command(
    settings: Settings,
    model: Path,
    adapters: tuple[tuple[str, float], ...],
    output: Path | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Fold the LoRA branches of an ONNX graph into the weights beside them.

    MODEL is an .onnx file: one with slots, one that the genai builder made with an adapter, or one that torch traced of a model
    of PEFT's. ADAPTER fills its slots: an .onnx_adapter file; or the name of an adapter that is inside, with the strength to
    fold it at. No node of a branch is left, and other weights keep their bytes.

    \b
    Examples:
      surgery fold traced/model.onnx -o folded/
      surgery fold with-slots/model.onnx with-slots/adapters/sql.onnx_adapter=0.7 -o sql/
    """
    from surgery.verbs.fold import fold

    with bar(settings, "folding") as progress:
        result = fold(model, adapters, output=output, dry_run=dry_run, progress=progress, **options)
    show_output("fold", result, settings, output)
