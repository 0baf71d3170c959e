# SPDX-License-Identifier: Apache-2.0
"""``surgery export-onnx``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery_cli.options import Settings, complete_files, output_option, overwrite_option, weighted
from surgery_cli.options import command as sub_command
from surgery_cli.output import emit_json, pairs, warn
from surgery_formats.text import count, nbytes, show

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
@click.argument("adapters", nargs=-1, type=weighted, metavar="[ADAPTER[=WEIGHT]]...", shell_complete=complete_files)
@output_option("Folder to make, or BASE's own folder, to which files are only added.")
@click.option(
    "--mode",
    type=click.Choice(["merged", "swappable", "prefix"]),
    help="Where every ADAPTER goes; by default what can be merged is, and a soft prompt is a prefix.",
)
@click.option("--merge", multiple=True, type=weighted, metavar="A[=W]", help="Fold an adapter into the weights.")
@click.option("--swap", multiple=True, metavar="B", help="Give a LoRA slots, and a file that fills them.")
@click.option("--prefix", multiple=True, metavar="C", help="Put a soft prompt in front of every input.")
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
def command(
    settings: Settings,
    base: str,
    adapters: tuple[tuple[str, float], ...],
    output: Path,
    mode: str | None,
    merge: tuple[tuple[str, float], ...],
    swap: tuple[str, ...],
    prefix: tuple[str, ...],
    **options: Any,
) -> None:
    """Export a model as ONNX graphs that use its weight files as they are.

    Adapters are merged (what changes goes into a second weight file where BASE's are used as they are), kept apart to be swapped while a
    session runs, or put in front as a soft prompt; all of it mixes. OUT gets model.onnx, tokenizer and configuration, and
    genai_config.json, so that onnxruntime-genai runs the folder as it is.

    \b
    Examples:
      surgery export-onnx llama/ -o llama/            adds a graph of a few hundred kB
      surgery export-onnx llama/ -o out/ --target cuda
      surgery export-onnx llama/ my-lora/ -o out/     merged into the weights
      surgery export-onnx llama/ -o out/ --merge facts=0.5 --swap style --prefix persona
    """
    from surgery.onnx.export import export_onnx
    from surgery_formats.refs import resolve

    began = time.monotonic()
    to_merge, to_swap, to_prefix = [*merge], [*swap], [*prefix]
    for reference, weight in adapters:
        place = mode or _mode_of(reference)
        if place == "merged":
            to_merge.append((reference, weight))
        elif weight != 1.0:
            raise click.UsageError(f"a weight is for adapters that are merged, and '{show(reference)}' is not")
        else:
            (to_swap if place == "swappable" else to_prefix).append(reference)
    result = export_onnx(
        resolve(base),
        output=output,
        merge=[(resolve(reference), weight) for reference, weight in to_merge],
        swap=[resolve(reference) for reference in to_swap],
        prefix=[resolve(reference) for reference in to_prefix],
        **options,
    )
    seconds = time.monotonic() - began
    if settings.json:
        emit_json("export-onnx", result.as_json() | {"seconds": round(seconds, 3)})
    elif not settings.quiet:
        _tell(result, seconds)
    for text in result.warnings:
        warn(text)


def _mode_of(reference: str) -> str:
    """A soft prompt goes in front, everything else into the weights."""
    from surgery_formats.adapters.registry import read_adapter
    from surgery_formats.refs import resolve

    adapter = read_adapter(resolve(reference))
    return "prefix" if adapter.prompt is not None and not adapter.updates else "merged"


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
    if contract.adapters:
        rows.insert(1, ("adapters", ", ".join(f"{one['name']} ({one['mode']})" for one in contract.adapters)))
    pairs([(label, show(text, 500)) for label, text in rows])


def _side(padding: str) -> str:
    return {"any": "left or right"}.get(padding, padding)
