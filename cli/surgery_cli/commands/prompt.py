# SPDX-License-Identifier: Apache-2.0
"""``surgery prompt``: the sub-commands for soft prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_output, show_result
from surgery_cli.pages import pages
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
@pages()
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
@pages()
@click.argument("prompt", shell_complete=complete_files)
@click.argument("base", shell_complete=complete_files)
@option.choice("--by", values=("distance", "effect"), help="What lies near each token, or what each does on texts.")
@option.texts("effects")
@click.option(
    "--max-tokens",
    type=option.count(2),
    default=2048,
    show_default=True,
    help="Most tokens of all texts to measure on; of more, pieces spread evenly over them.",
)
@click.option("--top", type=option.count(), default=5, show_default=True, help="Tokens to find for each.")
@click.option(
    "--sample",
    type=option.count(),
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

    with bar(settings, "measuring", unit="tokens") as progress:
        result = prompt_nearest(prompt, base, texts=_texts(texts, text_file, ids), progress=progress, **options)
    show_result("prompt nearest", result, settings, data=True)


@subcommand("bake")
@pages()
@click.argument("prompt", metavar="[PROMPT]", shell_complete=complete_files)
@click.argument("base", required=False, metavar="BASE", shell_complete=complete_files)
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
@option.threads("--workers", help="Computing threads; by default one per core, at most 8.")
@option.dry_run("Show what would be written; write nothing.")
@option.overwrite()
def bake(settings: Settings, prompt: str | None, base: str | None, output: Path | None, **options: Any) -> None:
    """Bake PROMPT into the files of BASE.

    Programs that know nothing of soft prompts serve the result.

    As tokens: OUT is the model with the virtual tokens in its vocabulary, words <p_0> ... in its tokenizer, which puts them
    before every text and conversation, and a head that never says them. As keys and values: OUT has a cache that transformers
    loads, and an .onnx_adapter.

    \b
    Examples:
      surgery prompt bake my-prompt/ llama/ -o llama-prompted/
      surgery prompt bake my-prefix/ llama/ -o prefix/ --as kv
      surgery prompt bake llama/ -o system/ --as kv --text "You are a pirate."
    """
    from surgery.verbs.prompt_bake import prompt_bake

    if base is None:  # of one operand it is the model
        prompt, base = None, prompt
    with bar(settings, "baking") as progress:
        result = prompt_bake(prompt, base, output=output, progress=progress, **options)
    show_output("prompt bake", result, settings, output)


@subcommand("combine")
@pages()
@click.argument(
    "prompts",
    nargs=-1,
    required=True,
    type=option.weighted,
    metavar="PROMPT[=WEIGHT]...",
    shell_complete=complete_files,
)
@option.output("Folder to make; it must not exist yet.")
@option.choice(
    "--method", values=("concatenate", "average", "mix"), help="One behind the other, or added up by weights."
)
@option.dry_run("Show what would be made; write nothing.")
@option.overwrite()
def combine(settings: Settings, prompts: tuple[tuple[str, float], ...], output: Path | None, **options: Any) -> None:
    """Combine soft prompts into one.

    One behind the other, in this order; or added up: by weights made to add up to 1, or by the weights as they are.

    \b
    Examples:
      surgery prompt combine style/ facts/ -o both/
      surgery prompt combine a=0.7 b=0.3 -o between/ --method average
    """
    from surgery.verbs.prompt_combine import prompt_combine

    show_output("prompt combine", prompt_combine(prompts, output=output, **options), settings, output)


def _kind(ctx: click.Context, param: click.Parameter, value: str) -> str:
    from surgery.prompts.conversion import TARGETS
    from surgery_formats.text import closest, show

    if value not in TARGETS:
        hint = closest(value, TARGETS) or f"there are {', '.join(TARGETS)}"
        raise click.BadParameter(f"no kind of soft prompt '{show(value, 40)}'; {hint}")
    return value


@subcommand("convert")
@pages()
@click.argument("prompt", shell_complete=complete_files)
@option.output("Folder to make, or file of a textual inversion.")
@click.option(
    "--to",
    required=True,
    metavar="KIND",
    callback=_kind,
    help="prompt, p-tuning, cpt, prefix: of PEFT; adapterhub; embedding, learned-embeds: textual inversions.",
)
@option.reference("--base", metavar="BASE", help="The model, where keys and values come from it.")
@click.option("--component", metavar="NAME", help="The text encoder, of a prompt for several.")
@option.dry_run("Show what would be made; write nothing.")
@option.overwrite()
def convert(settings: Settings, prompt: str, output: Path | None, **options: Any) -> None:
    """Convert PROMPT to another kind, where that does the same.

    Rows before the input become keys and values by what BASE makes of them, and never the other way round.

    \b
    Examples:
      surgery prompt convert p-tuned/ --to prompt -o prompt/
      surgery prompt convert prompt/ --to prefix --base llama/ -o prefix/
      surgery prompt convert hub-prefix/ --to prefix --base llama/ -o prefix/
    """
    from surgery.verbs.prompt_convert import prompt_convert

    show_output("prompt convert", prompt_convert(prompt, output=output, **options), settings, output)


@subcommand("transfer")
@pages()
@click.argument("prompt", shell_complete=complete_files)
@click.argument("base", shell_complete=complete_files)
@click.option(
    "--onto", required=True, metavar="MODEL", shell_complete=complete_files, help="The model to write it for."
)
@option.output("Folder to make; it must not exist yet.")
@option.choice("--method", values=("auto", "ridge", "orthogonal"), help="Of the map; auto: what holds better.")
@option.texts("its gain")
@click.option("--accept-loss", is_flag=True, help="Write what a worthless map makes, too.")
@option.dry_run("Show the score; write nothing.")
@option.overwrite()
def transfer(
    settings: Settings,
    prompt: str,
    base: str,
    output: Path | None,
    texts: tuple[str, ...],
    text_file: Path | None,
    ids: tuple[tuple[int, ...], ...],
    **options: Any,
) -> None:
    """Transfer PROMPT from BASE to a model with the same tokenizer.

    Its rows are led there by a map that is fitted to the tokens both models have, and tried on tokens held out. On texts its
    gain is measured on both models.

    \b
    Examples:
      surgery prompt transfer my-prompt/ llama-1b/ --onto llama-3b/ -o prompt-3b/ --text-file held-out.txt
      surgery prompt transfer my-prompt/ llama-1b/ --onto llama-3b/ --dry-run
    """
    from surgery.verbs.prompt_transfer import prompt_transfer

    result = prompt_transfer(prompt, base, output=output, texts=_texts(texts, text_file, ids), **options)
    show_output("prompt transfer", result, settings, output)


def _texts(
    texts: tuple[str, ...], text_file: Path | None, ids: tuple[tuple[int, ...], ...]
) -> list[str | tuple[int, ...]] | None:
    from surgery_formats.files.text_file import read_text_file

    of_file = () if text_file is None else (read_text_file(text_file)[0].decode(),)
    return [*texts, *of_file, *ids] or None


for _each in (show, nearest, bake, combine, convert, transfer):
    command.add_command(_each)
