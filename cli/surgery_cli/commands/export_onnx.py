# SPDX-License-Identifier: Apache-2.0
"""``surgery export-onnx``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery_cli.options import Settings, complete_files, output_option, overwrite_option
from surgery_cli.options import command as sub_command
from surgery_cli.output import emit_json, pairs, warn
from surgery_formats.text import count, nbytes

if TYPE_CHECKING:
    from surgery.onnx.export import ExportResult

__all__ = ["command"]

_WEIGHTS = {
    "reference": "used where they lie",
    "link": "hard links",
    "copy": "copied",
    "embed": "inside the graph",
}


@sub_command("export-onnx")
@click.argument("base", shell_complete=complete_files)
@output_option("Folder to make, or BASE's own folder, to which files are only added.")
@click.option(
    "--target",
    type=click.Choice(["cuda", "cpu", "portable"]),
    default="cpu",
    show_default=True,
    help="Where it will run; portable: operators of ONNX only.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
    default="auto",
    show_default=True,
    help="Type of arithmetic, logits and cache; auto: BASE's where the target has it.",
)
@click.option(
    "--weights",
    type=click.Choice(["auto", "reference", "link", "copy", "embed"]),
    default="auto",
    show_default=True,
    help="auto: reference if OUT is BASE's folder, else copy (blocks are shared where the file system can).",
)
@click.option("--max-length", type=click.IntRange(min=1), metavar="N", help="Longest sequence; default: as BASE.")
@overwrite_option()
def command(settings: Settings, base: str, output: Path, **options: Any) -> None:
    """Export a model as ONNX graphs that use its weight files as they are.

    OUT gets model.onnx, tokenizer and configuration, and genai_config.json, so that onnxruntime-genai runs the folder as it is.

    \b
    Examples:
      surgery export-onnx llama/ -o llama/            adds a graph of a few hundred kB
      surgery export-onnx llama/ -o out/ --target cuda
    """
    from surgery.onnx.export import export_onnx
    from surgery_formats.refs import resolve

    began = time.monotonic()
    result = export_onnx(resolve(base), output=output, **options)
    seconds = time.monotonic() - began
    if settings.json:
        emit_json("export-onnx", result.as_json() | {"seconds": round(seconds, 3)})
    elif not settings.quiet:
        _tell(result, seconds)
    for text in result.warnings:
        warn(text)


def _tell(result: ExportResult, seconds: float) -> None:
    contract = result.contract
    rows = [
        ("graph", f"{result.nodes} nodes for {contract.target} in {contract.dtype}: {', '.join(result.files)}"),
        ("weights", f"{', '.join(one.name for one in contract.weights)}: {_WEIGHTS[result.weights]}"),
        ("written", f"{nbytes(result.nbytes)} in {seconds:.2f} s"),
    ]
    if contract.kind == "decoder":
        rows.insert(
            1,
            (
                "reach",
                f"{count(contract.max_length)} tokens; rows of a batch are padded on the {_side(contract.padding)}",
            ),
        )
        rows.append(("next", f'surgery run {result.output} -p "..."'))
    pairs(rows)


def _side(padding: str) -> str:
    return {"any": "left or right"}.get(padding, padding)
