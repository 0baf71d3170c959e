# SPDX-License-Identifier: Apache-2.0
"""``surgery prompt``: the sub-commands for soft prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_output, show_result
from surgery_cli.progress import bar

__all__ = ["command"]


@click.group(
    "prompt",
    params=option.global_options(),
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)
def command() -> None:
    """Show, read, bake, combine, convert and transfer soft prompts.

    A soft prompt is virtual tokens that were trained instead of weights: prompt tuning, P-tuning, CPT and prefix tuning of
    PEFT, prompts and prefixes of AdapterHub, textual inversions.
    """


@subcommand("show")
@click.argument("prompt", shell_complete=complete_files)
@option.reference("--base", metavar="BASE", help="The model: check that it fits, and compare norms with its tokens'.")
def show(settings: Settings, prompt: str, base: str | None) -> None:
    """Show what a soft prompt is: kind, tokens, norms, origin.

    \b
    Examples:
      surgery prompt show my-prompt/
      surgery prompt show my-prompt/ --base llama/
    """
    from surgery.verbs.prompt_show import prompt_show

    show_result("prompt show", prompt_show(prompt, base=base), settings, data=True)


@subcommand("nearest")
@click.argument("prompt", shell_complete=complete_files)
@click.argument("base", shell_complete=complete_files)
@option.choice("--by", values=("distance", "effect"), help="What lies near each token, or what each does on texts.")
@click.option("-p", "--text", "texts", multiple=True, metavar="TEXT", help="Text to measure effects on.")
@click.option("--text-file", type=click.Path(path_type=Path), metavar="FILE", help="File of such a text.")
@click.option("--ids", multiple=True, metavar="1,5,9", callback=option.token_ids, help="Token ids instead of text.")
@click.option("--length", type=click.IntRange(min=2), default=128, show_default=True, help="Most tokens of a text.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Tokens to find for each.")
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    help="Tokens asked for their own nearest neighbour; by default all of a small vocabulary, else 512.",
)
@click.option("--component", metavar="NAME", help="The text encoder to look at, of a prompt for several.")
def nearest(
    settings: Settings,
    prompt: str,
    base: str,
    texts: tuple[str, ...],
    text_file: Path | None,
    ids: tuple[tuple[int, ...], ...],
    **options: Any,
) -> None:
    """Find the tokens of BASE nearest to the virtual ones of PROMPT.

    By cosine, distance and dot product; and what each match is worth, by how far tokens are from one another, and how near
    a random direction comes to one. By effect: what each virtual token does to the next token of a text and to attention,
    and what is left of that with the nearest token, or a random one, in its place.

    \b
    Examples:
      surgery prompt nearest my-prompt/ llama/
      surgery prompt nearest my-prompt/ llama/ --by effect -p "Once upon a time"
      surgery prompt nearest my-prefix/ llama/ --by effect --text-file held-out.txt
    """
    from surgery.verbs.prompt_nearest import prompt_nearest

    of_file = () if text_file is None else (text_file.read_text(encoding="utf-8"),)
    given = [*texts, *of_file, *ids] or None
    result = prompt_nearest(prompt, base, texts=given, **options)
    show_result("prompt nearest", result, settings, data=True)


@subcommand("bake")
@click.argument("base", shell_complete=complete_files)
@click.argument("prompt", required=False, shell_complete=complete_files)
@option.output("Folder to make; it must not exist yet.")
@option.choice("--as", "form", values=("tokens", "kv"), help="Tokens of the vocabulary, or keys and values.")
@click.option("--text", metavar="TEXT", help="A text in place of PROMPT, as keys and values.")
@click.option("--name", default="p", show_default=True, help="What the tokens are called: <p_0>, <p_1> ...")
@click.option("--keep-tie", is_flag=True, help="Leave a tied head tied, for programs that know the model no other way.")
@option.choice(
    "--dtype",
    values=("keep", "bf16", "fp16", "fp32"),
    help="Of keys and values; keep: the base's.",
    case_sensitive=False,
)
@click.option("--workers", type=click.IntRange(min=1), help="Computing threads; by default one per core, at most 8.")
@option.dry_run("Show what would be written; write nothing.")
@option.overwrite()
def bake(settings: Settings, base: str, prompt: str | None, output: Path | None, **options: Any) -> None:
    """Bake PROMPT into the files of BASE, so that programs that know nothing of it serve it.

    As tokens: OUT is the model with the virtual tokens in its vocabulary, words <p_0> ... in its tokenizer, which puts them
    before every text and conversation, and a head that never says them. As keys and values: OUT has a cache that transformers
    loads, and an .onnx_adapter.

    \b
    Examples:
      surgery prompt bake llama/ my-prompt/ -o llama-prompted/
      surgery prompt bake llama/ my-prefix/ -o prefix/ --as kv
      surgery prompt bake llama/ -o system/ --as kv --text "You are a pirate."
    """
    from surgery.verbs.prompt_bake import prompt_bake

    with bar(settings, "baking") as progress:
        result = prompt_bake(base, prompt, output=output, progress=progress, **options)
    show_output("prompt bake", result, settings, output)


for _each in (show, nearest, bake):
    command.add_command(_each)
