# SPDX-License-Identifier: Apache-2.0
"""``surgery convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.commands.check import complete_consumers, consumer
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_output
from surgery_cli.pages import pages
from surgery_cli.progress import bar
from surgery_formats.text import show

__all__ = ["command"]


def _dialect(text: str) -> str:
    """A dialect's name."""
    from surgery_formats.adapters.peft import PEFT
    from surgery_formats.text import closest, listing

    if text not in PEFT.dialects:
        hint = closest(text, PEFT.dialects) or f"there are {listing(PEFT.dialects, 20)}"
        raise click.BadParameter(f"no dialect of experts '{show(text)}'; {hint}")
    return text


def _complete_dialect(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from surgery_formats.adapters.peft import PEFT

    return [name for name in PEFT.dialects if name.startswith(incomplete)]


@subcommand("convert")
@pages()
@click.argument("adapter", shell_complete=complete_files)
@option.format_option("See 'surgery formats'.")
@click.option(
    "--for",
    "consumer",
    type=consumer,
    metavar="CONSUMER[@VERSION]",
    shell_complete=complete_consumers,
    help="In place of --to: the program that will load it, and must honour all of it; see 'surgery check'.",
)
@option.output("Folder to make, or file where FORMAT is a single file.")
@option.alpha
@option.reference("--base", metavar="BASE", help="The model it was trained on, if FORMAT needs its names.")
@option.reference(
    "--graph", metavar="X.onnx", help="For onnx-adapter: the graph that will take it; names and types are its inputs'."
)
@click.option("--component", metavar="NAME", help="The part of a pipeline, e.g. unet.")
@click.option(
    "--without",
    multiple=True,
    metavar="PATTERN",
    help="Leave out modules of this name, such as those that BASE lacks: 'text_encoder:*'. May be repeated.",
)
@click.option(
    "--projections",
    type=click.Choice(["split", "fused"]),
    help="Make qkv_proj and gate_up_proj of their parts, or parts of them.",
)
@click.option(
    "--dialect",
    type=_dialect,
    metavar="NAME",
    shell_complete=_complete_dialect,
    help="How FORMAT is to hold the experts of a mixture: see 'surgery formats'.",
)
@click.option("--as", "as_kind", type=click.Choice(["lora"]), help="Write LoRAs, whatever the kind of ADAPTER.")
@click.option(
    "--saved",
    type=click.Choice(["lora", "drop"]),
    help="With --for: modules trained in full become LoRAs, or are left out.",
)
@click.option("--max-rank", type=option.count(), help="With --for: greatest rank that it was started with.")
@click.option("--rank", type=option.count(), help="With --as or --for: greatest rank of a weight.")
@click.option(
    "--energy", type=option.share, metavar="SHARE", help="With --as or --for: share of a change to keep, e.g. .99."
)
@click.option(
    "--max-error", type=option.share, metavar="SHARE", help="With --as or --for: greatest error of a change, e.g. .05."
)
@option.path(
    "--merge-rest",
    metavar="BASE_OUT",
    help="With --for: merge what the program cannot honour into a copy of BASE, made here.",
)
@click.option("--allow-loss", is_flag=True, help="Leave out what FORMAT cannot hold.")
@option.dtype
@click.option(
    "--factors",
    type=click.Choice(["int8", "int4"]),
    help="Codes of compact's factors; default int8.",
)
@option.dry_run("Show what would become of every part; write nothing.")
@option.engine
@option.overwrite()
def command(
    settings: Settings,
    adapter: str,
    alpha: float | None,
    to: str | None,
    output: Path | None,
    as_kind: str | None,
    **options: Any,
) -> None:
    """Convert an adapter to another format, or a graph's weights to safetensors.

    What was written is read back, and must change every weight as ADAPTER does. What FORMAT cannot hold is an error
    that names it.

    With --as lora an adapter of another kind (LoHa, OFT, DoRA ...) is written as LoRAs: exactly where its changes are of
    low rank; else give a rank, an energy or an error, and each weight's error is shown. Kinds whose change depends on
    the weight need --base.

    With --to safetensors ADAPTER is an ONNX graph, and its weights are written: under its own names, or, told by their
    values, under those of --base.

    \b
    Examples:
      surgery convert my-lora/ --to mlx -o my-lora-mlx/
      surgery convert phi3-lora/ --to peft -o llama-names/ --projections split --base phi3/
      surgery convert style.safetensors --to peft --base sdxl/ -o style-peft/
      surgery convert moe-lora/ --to peft --dialect sglang --base qwen3-moe/ -o for-sglang/
      surgery convert my-lora/ --to compact --factors int4 -o my-lora-int4/
      surgery convert my-rslora/ --for sglang --base llama/ -o for-sglang/
      surgery convert my-lora/ --to onnx-adapter --graph olive/model.onnx -o my-lora.onnx_adapter
      surgery convert exported/model.onnx --to safetensors --base llama/ -o recovered/
      surgery convert my-oft/ --to peft --as lora --max-error .05 --base llama/ -o as-lora/
    """
    from surgery.verbs.convert import convert

    if (to is None) == (options["consumer"] is None):
        raise click.UsageError("give either --to FORMAT or --for CONSUMER")
    if options["consumer"] is None and (options["saved"] or options["max_rank"] or options["merge_rest"]):
        raise click.UsageError("--saved, --max-rank and --merge-rest go with --for")
    sizes = {name: options.pop(name) for name in ("rank", "energy", "max_error")}
    if any(value is not None for value in sizes.values()):
        if as_kind is None and options["consumer"] is None:
            raise click.UsageError("--rank, --energy and --max-error go with --as lora; 'surgery resize' cuts a LoRA")
        options["rank"] = option.rank_of(**sizes)
    with bar(settings, "converting") as progress:
        told = option.told_alpha(adapter, alpha)
        result = convert(told, to, output=output, as_lora=as_kind == "lora", progress=progress, **options)
    show_output("convert", result, settings, output)
