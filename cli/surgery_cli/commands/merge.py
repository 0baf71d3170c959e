# SPDX-License-Identifier: Apache-2.0
"""``surgery merge``."""

from __future__ import annotations

from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_result
from surgery_cli.pages import pages
from surgery_cli.progress import bar
from surgery_formats.text import show

__all__ = ["command"]

Weighted = tuple[str, float]


def _replaced(text: str) -> tuple[Weighted, Weighted]:
    """``OLD[=WEIGHT]=NEW[=WEIGHT]``.

    Raises:
        click.BadParameter: anything else.
    """
    found: list[Weighted] = []
    for word in text.split("="):
        try:
            weight = float(word)
        except ValueError:
            found.append((word, 1.0))
            continue
        if found:
            found[-1] = (found[-1][0], weight)
    if len(found) != 2 or not all(name for name, _ in found):
        raise click.BadParameter(f"'{show(text)}' is not OLD=NEW")
    return found[0], found[1]


@subcommand("merge")
@pages()
@click.argument("base", shell_complete=complete_files)
@option.adapters(required=False)
@option.output("Folder to make; it must not exist yet.")
@option.alpha
@option.dtype
@option.device_option
@option.threads(
    "--workers",
    help="Computing threads, or processes for much; by default one per core, at most 8 threads or 16 processes.",
)
@option.engine
@click.option(
    "--memory-limit", type=option.size, metavar="SIZE", help="Most memory for tensors being computed, e.g. 2GB."
)
@click.option(
    "--shard-size", type=option.size, metavar="SIZE", help="Most bytes per weight file, e.g. 5GB; default: as BASE."
)
@option.choice("--layout", values=("keep", "packed"), help="packed: matrices that export-onnx joins lie side by side.")
@option.choice(
    "--quantized",
    values=("dequantize", "requantize", "residual"),
    help="A quantised BASE becomes one of 16 bits, keeps its format, or keeps it with a LoRA of the rest beside it.",
)
@click.option(
    "--reversible", is_flag=True, help="Keep what rounding loses in OUT/base.rounding, for 'surgery unmerge'."
)
@click.option(
    "--only-touched", is_flag=True, help="Dequantise only what an ADAPTER changes; the rest keeps its format."
)
@click.option(
    "--rounding",
    type=click.Choice(["feedback", "nearest"]),
    help="Codes of requantize: feedback (default) makes up for errors where nearest loses the update.",
)
@click.option("--rank", type=option.count(), help="Of residual: most directions of a weight's LoRA.")
@click.option(
    "--max-error",
    type=option.number(above=0),
    metavar="NUMBER",
    help="Of residual: error of a weight, relative to its update.",
)
@click.option(
    "--calibration", metavar="FILE", help="Of requantize: inputs to make up for errors along, as of extract-lora."
)
@click.option("--accept-loss", is_flag=True, help="Write codes that hold less than half of the update, too.")
@click.option(
    "--without",
    multiple=True,
    metavar="PATTERN",
    help="Leave out modules of this name, such as those that BASE lacks: 'text_encoder:*'. May be repeated.",
)
@click.option(
    "--replace",
    multiple=True,
    type=_replaced,
    metavar="OLD=NEW",
    help="Take OLD, which was merged into BASE, back, and merge NEW; OLD=0.7=NEW=0.5 with weights. May be repeated.",
)
@option.reference(
    "--as-trained",
    metavar="QUANTISED",
    help="Take the values of the quantised model that was trained on; or nf4, nf4-double, fp4: as bitsandbytes loads BASE.",
)
@click.option(
    "--base",
    "graph_of",
    metavar="CHECKPOINT",
    shell_complete=complete_files,
    help="Of an ONNX graph as BASE: the checkpoint it was made of. Only located weights change.",
)
@option.verify("full: compare what was copied byte by byte too, and note the sha256 of every file.")
@option.dry_run("Show what would be done; write nothing.")
@option.overwrite()
def command(
    settings: Settings,
    base: str,
    adapters: tuple[tuple[str, float], ...],
    alpha: float | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Merge adapters into a base model.

    BASE is a weight file, a Hugging Face folder, a diffusers pipeline, or an ONNX graph with --base; each ADAPTER may have a
    weight. OUT gets BASE's files, each tensor's own type kept, with every adapter folded in. All of it appears at once, or
    nothing does.

    \b
    Examples:
      surgery merge llama/ my-lora/ -o merged/
      surgery merge llama/ style=0.7 facts=0.5 -o merged/ --dtype bf16
      surgery merge llama/ my-lora/ -o merged/ --dry-run
      surgery merge merged/ --replace my-lora/=my-better-lora/ -o better/
      surgery merge model.onnx my-lora/ --base llama/ -o merged/
    """
    from surgery.verbs.merge import merge

    pairs = options.pop("replace")
    adapters = (*adapters, *(new for _, new in pairs))
    if not adapters:
        raise click.UsageError("name an ADAPTER")
    options["replace"] = [(option.told_alpha(reference, alpha), weight) for (reference, weight), _ in pairs]
    with bar(settings, "merging") as progress:
        told = [(option.told_alpha(reference, alpha), weight) for reference, weight in adapters]
        result = merge(base, told, dry_run=dry_run, progress=progress, **options)
    show_result("merge", result, settings, data=dry_run)
