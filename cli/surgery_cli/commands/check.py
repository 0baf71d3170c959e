# SPDX-License-Identifier: Apache-2.0
"""``surgery check``."""

from __future__ import annotations

from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.commands.diff import FINDINGS
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_result
from surgery_cli.pages import pages
from surgery_cli.progress import bar

__all__ = ["command", "complete_consumers", "consumer"]


def consumer(text: str) -> str:
    """A consumer's name, plugins' included, with or without a version."""
    from surgery.consumers.registry import consumer_named
    from surgery_formats.errors import SurgeryError

    try:
        consumer_named(text)
    except SurgeryError as error:
        raise click.BadParameter(f"{error.message}; {error.hint}" if error.hint else error.message) from error
    return text


def complete_consumers(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of consumers that begin so."""
    from surgery.consumers.registry import consumers

    return [name for name in consumers() if name.startswith(incomplete)]


@subcommand("check")
@pages()
@click.argument("base", metavar="BASE", shell_complete=complete_files)
@click.argument("adapter", metavar="ADAPTER", shell_complete=complete_files)
@click.option(
    "--for",
    "consumer",
    type=consumer,
    metavar="CONSUMER[@VERSION]",
    shell_complete=complete_consumers,
    help="The program that will load it, e.g. vllm or sglang@0.5.23; by default all are asked.",
)
@option.path(
    "--fix",
    metavar="OUT",
    help="Write the adapter so that the program of --for honours all of it.",
)
@click.option(
    "--saved",
    type=click.Choice(["lora", "drop"]),
    help="With --fix: modules trained in full become LoRAs, or are left out.",
)
@click.option("--rank", type=option.count(), help="With --fix: greatest rank where other kinds become LoRAs.")
@click.option("--energy", type=option.share, metavar="SHARE", help="With --fix: share of a change to keep, e.g. .99.")
@click.option(
    "--max-error", type=option.share, metavar="SHARE", help="With --fix: greatest error of a change, e.g. .05."
)
@click.option(
    "--max-rank",
    type=option.count(),
    help="What the program was started with, e.g. vLLM's --max-lora-rank; default: its own.",
)
@option.path(
    "--merge-rest",
    metavar="BASE_OUT",
    help="With --fix: merge what the program cannot honour into a copy of BASE, made here.",
)
@click.option("--allow-loss", is_flag=True, help="With --fix: leave out what the program cannot honour.")
@option.overwrite()
def command(settings: Settings, base: str, adapter: str, **options: Any) -> None:
    """Show what programs make of an adapter.

    Of each part it tells whether a program honours it, scales it wrongly, ignores or refuses it. The rules come from the
    programs' own code, which need not be installed. With --for, exit code 6 says that the program does not honour all of
    it. With --fix it is written anew: scales inside B, ranks padded, other kinds as LoRA; what was written is read back,
    compared, and checked again.

    \b
    Examples:
      surgery check llama/ my-lora/
      surgery check llama/ my-lora/ --for vllm
      surgery check llama/ my-rslora/ --for sglang@0.5.23 --fix for-sglang/
      surgery check llama/ grown/ --for vllm --fix lora-only/ --merge-rest llama-grown/
      surgery check llama/ my-dora/ --for llama.cpp --fix plain/ --max-error .05
    """
    from surgery.verbs.check import check

    sizes = {name: options.pop(name) for name in ("rank", "energy", "max_error")}
    if options["fix"] is None and (
        options["saved"] or options["allow_loss"] or options["merge_rest"] or any(v is not None for v in sizes.values())
    ):
        raise click.UsageError("--saved, --merge-rest, --rank, --energy, --max-error and --allow-loss go with --fix")
    if options["fix"] is not None and options["consumer"] is None:
        raise click.UsageError("--fix goes with --for, which names the program")
    if any(value is not None for value in sizes.values()):
        options["rank"] = option.rank_of(**sizes)
    with bar(settings, "writing") as progress:
        result = check(base, adapter, progress=progress, **options)
    show_result("check", result, settings, data=options["fix"] is None)
    if result.one and not result.honoured:
        raise click.exceptions.Exit(FINDINGS)
