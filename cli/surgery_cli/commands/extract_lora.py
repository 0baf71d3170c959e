# SPDX-License-Identifier: Apache-2.0
"""``surgery extract-lora``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_output
from surgery_cli.pages import pages
from surgery_cli.progress import bar
from surgery_formats.errors import FitError
from surgery_formats.text import show

__all__ = ["command"]


_MOST_RANK = 1 << 20


def _rank(text: str) -> int | str:
    """A number of directions, or ``auto``."""
    if text == "auto":
        return text
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:12]) <= _MOST_RANK:
        raise click.BadParameter(f"'{show(text, 40)}' is neither a number from 1 to {_MOST_RANK} nor 'auto'")
    return int(text)


def _rank_pattern(text: str) -> tuple[str, int]:
    pattern, equals, rank_text = text.rpartition("=")
    rank = _rank(rank_text)
    if not equals or not pattern or not isinstance(rank, int):
        raise click.BadParameter(f"'{show(text, 40)}' is not PATTERN=N")
    return pattern, rank


def _budget(text: str) -> str:
    from surgery.rank import Budget

    try:
        Budget.parse(text)
    except FitError as error:
        raise click.BadParameter(f"{error.message}: {error.hint}") from error
    return text


def _dense(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if not set(parts) <= {"norm", "bias", "none"} or ("none" in parts and len(parts) > 1):
        raise click.BadParameter(f"'{show(text, 40)}' is not norm, bias, norm,bias or none")
    return tuple(part for part in parts if part != "none")


@subcommand("extract-lora")
@pages()
@click.argument("base", shell_complete=complete_files)
@click.argument("tuned", shell_complete=complete_files)
@option.output("Folder to make, or file where FORMAT is a single file.")
@click.option("--rank", type=_rank, metavar="N|auto", help="Directions per matrix; 16 if nothing else is said.")
@click.option(
    "--rank-pattern",
    type=_rank_pattern,
    multiple=True,
    metavar="PATTERN=N",
    help="Another rank for some modules: 'mlp.*=32'; the first that matches holds.",
)
@click.option(
    "--energy", type=option.true_share, metavar="SHARE", help="Instead: share of each matrix' squared change to hold."
)
@click.option(
    "--max-error",
    type=option.true_share,
    metavar="SHARE",
    help="Instead: most that may be missing of each matrix' change.",
)
@click.option(
    "--budget", type=_budget, metavar="SIZE", help="Instead: 20MB, or 2M parameters, shared out where it helps most."
)
@option.choice(
    "--kind",
    values=("auto", "lora", "dora"),
    help="auto: DoRA where it leaves clearly less than a LoRA of as many parameters.",
)
@option.path(
    "--calibration",
    metavar="FILE",
    help="Inputs of modules (safetensors), for factors that are best on them.",
)
@click.option("--alpha", type=option.number(above=0), metavar="NUMBER", help="lora_alpha; default: the rank.")
@click.option("--rslora", is_flag=True, help="Scale by alpha / sqrt(rank).")
@click.option(
    "--dense",
    type=_dense,
    default="norm,bias",
    show_default=True,
    metavar="norm,bias|none",
    help="One-dimensional changes to keep.",
)
@option.choice("--embeddings", values=("lora", "full"), help="Form of embedding and head.")
@option.choice("--matrices", values=("lora", "full"), help="full: what changed as TUNED has it, for 'surgery insert'.")
@option.choice(
    "--adapter-dtype",
    "dtype",
    values=("auto", "fp32", "bf16", "fp16"),
    help="Stored type of the factors; auto: as TUNED.",
)
@option.format_option("See 'surgery formats'.", default="peft", show_default=True)
@click.option("--factors", type=click.Choice(["int8", "int4"]), help="Store factors as codes: format compact.")
@click.option("--allow-loss", is_flag=True, help="Leave out what no form can hold.")
@click.option(
    "--beyond-rounding",
    is_flag=True,
    help="TUNED is a merge in 16 bits: find its LoRA more exactly than it was rounded.",
)
@option.devices_option
@option.engine
@option.threads(
    "--workers",
    help="Computing threads; by default one per core, at most 8; 3 for each GPU.",
)
@click.option("--table", is_flag=True, help="Show what ranks 4 to 64 cost and leave out, by layers; --html does too.")
@option.path(
    "--eval",
    metavar="TEXT",
    help="Measure how much of TUNED's gain on a text the adapter has; with --table or --html other ranks too.",
)
@click.option(
    "--base",
    "graph_of",
    metavar="CHECKPOINT",
    shell_complete=complete_files,
    help="Of ONNX graphs as BASE and TUNED: the checkpoint whose names their weights get.",
)
@option.dry_run("Compare and factorise; write nothing.")
@option.overwrite()
def command(settings: Settings, base: str, tuned: str, output: Path | None, **options: Any) -> None:
    """Extract a LoRA from a full fine-tune.

    TUNED minus BASE, each matrix by its best factors of the rank asked for, everything else as TUNED has it. What was
    written is read back and must hold what was measured against TUNED; a change that nothing holds is an error that
    names it.

    \b
    Examples:
      surgery extract-lora llama/ my-llama/ -o my-lora/
      surgery extract-lora llama/ my-llama/ -o my-lora/ --rank 64
      surgery extract-lora llama/ my-llama/ -o my-lora/ --rank 16 --rank-pattern 'self_attn.*=32'
      surgery extract-lora llama/ my-llama/ -o my-lora/ --budget 20MB
      surgery extract-lora llama/ my-llama/ -o my-lora/ --rank 64 --factors int4
      surgery extract-lora llama/ my-llama/ -o my-lora/ --table --eval held-out.txt
      surgery extract-lora model.onnx tuned.onnx --base llama/ -o my-lora/
    """
    from surgery.verbs.extract_lora import extract_lora

    if options["kind"] == "dora" and options["calibration"] is not None:
        raise click.UsageError("--calibration weights the factors of a LoRA; --kind dora makes none")
    ways = [name for name in ("rank", "energy", "max_error", "budget") if options[name] is not None]
    if len(ways) > 1 and not (set(ways) == {"rank", "budget"} and options["rank"] == "auto"):
        raise click.UsageError(f"only one of {' and '.join('--' + way.replace('_', '-') for way in ways)} can be given")
    patterns = dict(options.pop("rank_pattern"))
    if patterns and (ways not in ([], ["rank"]) or options["rank"] == "auto"):
        raise click.UsageError("--rank-pattern goes with a number as --rank")
    if settings.pages is not None and "html" in settings.pages.files and set(ways) <= {"rank"}:
        options["table"] = True  # a page draws it
    chosen = {name: options.pop(name) for name in ("rank", "energy", "max_error", "budget")}
    with bar(settings, "extracting") as progress:
        rank = option.rank_of(**chosen, patterns=patterns)
        options |= {"rank": rank} if rank.choices else {}
        result = extract_lora(base, tuned, output=output, progress=progress, **options)
    show_output("extract-lora", result, settings, output)
