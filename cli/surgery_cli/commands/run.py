# SPDX-License-Identifier: Apache-2.0
"""``surgery run``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery_cli import interruption
from surgery_cli.options import Settings, complete_files
from surgery_cli.options import command as sub_command
from surgery_cli.output import emit_json, note
from surgery_formats.text import show

if TYPE_CHECKING:
    from surgery.verbs.run import RunResult

__all__ = ["command", "runtime_device_option", "spoken"]

_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_BEST = 3  # labels of an encoder that are shown


def runtime_device_option(function: Callable[..., None]) -> Callable[..., None]:
    """``--device`` of onnxruntime: whether it is there is looked up by the library, without torch."""
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda[:N]",
        callback=_device,
        help="Where it runs; auto: what the graph was made for, if it is here.",
    )(function)


def _device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    name, colon, number = value.partition(":")
    if name not in ("auto", "cpu", "cuda") or (colon and (name != "cuda" or not number.isdecimal() or len(number) > 3)):
        raise click.BadParameter(f"'{show(value)}' is none of auto, cpu, cuda, cuda:N")
    return value


def spoken(text: str) -> str:
    """A model's text as it may reach a terminal: lines and tabs stay, other control characters and reordering are escaped."""
    return "".join(
        ascii(c)[1:-1] if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f" or c in _BIDI else c for c in text
    )


def _ids(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    try:
        return tuple(tuple(int(part) for part in value.replace(",", " ").split()) for value in values)
    except ValueError as error:
        raise click.BadParameter("token ids are whole numbers, as in 1,5,9") from error


@sub_command("run")
@click.argument("model", shell_complete=complete_files)
@click.option(
    "-p", "--prompt", "texts", multiple=True, metavar="TEXT", help="Text to go on from; several make a batch."
)
@click.option("--ids", multiple=True, metavar="1,5,9", callback=_ids, help="Token ids instead of text.")
@click.option("--max-new", type=click.IntRange(min=0), default=128, show_default=True, help="Most new tokens.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: the likeliest token."
)
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="Only the k likeliest; 0: all.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Only the likeliest with this sum."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draws.")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="FILE", help=".onnx_adapter for the slots; several add up."
)
@click.option("--prompt-adapter", metavar="FILE", help=".onnx_adapter with a soft prompt.")
@click.option("--no-prompt", is_flag=True, help="Leave out the soft prompt that is the graph's own.")
@click.option("--weights", type=click.Path(path_type=Path), metavar="DIR", help="Folder of the weight files.")
@click.option("--threads", type=click.IntRange(min=1), help="On the cpu; by default one per core.")
@runtime_device_option
def command(
    settings: Settings,
    model: str,
    texts: tuple[str, ...],
    ids: tuple[tuple[int, ...], ...],
    max_new: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    adapters: tuple[str, ...],
    prompt_adapter: str | None,
    no_prompt: bool,
    weights: Path | None,
    threads: int | None,
    device: str,
) -> None:
    """Run an exported model: generate text, or classify it.

    MODEL is a folder with model.onnx, or the file. Text needs the package tokenizers (pip install tokenizers) and
    the tokenizer.json beside the graph; --ids needs neither. The graph says itself which padding and cache it takes.

    \b
    Examples:
      surgery run out/ -p "Once upon a time"
      surgery run out/ -p "Dear" --temperature 0.8 --top-p 0.95 --seed 7
      surgery run out/ -p "SELECT" --adapter sql.onnx_adapter
    """
    from surgery.onnx.run.sampling import Sampling
    from surgery.verbs.run import run

    inputs: list[str | tuple[int, ...]] = [*texts, *ids]
    if not inputs:
        raise click.UsageError("nothing to run on; give -p TEXT or --ids", click.get_current_context())
    if prompt_adapter is not None and no_prompt:
        raise click.UsageError("--prompt-adapter and --no-prompt exclude each other", click.get_current_context())
    single = len(inputs) == 1 and not settings.json

    def on_text(row: int, text: str) -> None:
        interruption.check()
        if single:
            click.echo(spoken(text), nl=False)

    result = run(
        model,
        inputs,
        device=device,
        max_new=max_new,
        sampling=Sampling(temperature, top_k, top_p, seed),
        adapters=adapters,
        prompt_adapter=prompt_adapter,
        prompt=not no_prompt,
        weights=weights,
        threads=threads,
        on_text=on_text,
    )
    if settings.json:
        emit_json("run", result.as_json())
        return
    _show(result, inputs, single)
    if not settings.quiet:
        _summary(result, settings)


def _show(result: RunResult, inputs: list[str | tuple[int, ...]], streamed: bool) -> None:
    for given, one in zip(inputs, result.texts, strict=True):
        if len(inputs) > 1:
            click.echo(f"> {show(given)}")
        if one.scores:
            for token, scores in enumerate(one.scores):
                best = sorted(scores.items(), key=lambda pair: -pair[1])[:_BEST]
                place = f"{token}\t" if len(one.scores) > 1 else ""
                click.echo(place + "  ".join(f"{show(label)} {share:.4f}" for label, share in best))
        elif one.reason and one.text is None:
            click.echo(",".join(map(str, one.tokens)))
        elif one.reason:
            click.echo("" if streamed else spoken(one.text or ""))
    for name, array in ({} if any(one.scores for one in result.texts) else result.arrays).items():
        click.echo(f"{show(name)}\t{'x'.join(map(str, array.shape))}")


def _summary(result: RunResult, settings: Settings) -> None:
    virtual = f", {result.virtual_tokens} virtual tokens" if result.virtual_tokens else ""
    text = f"{result.device}: loaded in {result.load_seconds:.2f} s{virtual}"
    if result.new_tokens:
        text += f", first token {result.first_seconds * 1e3:.1f} ms, {result.new_tokens} tokens"
        if (rest := result.seconds - result.first_seconds) > 0 and result.new_tokens > len(result.texts):
            text += f", {(result.new_tokens - len(result.texts)) / rest:.1f} tokens/s"
    note(text)
    if any(one.reason == "full" for one in result.texts):
        note("the graph's longest sequence is reached")
    if settings.verbose:
        for one in result.texts:
            note(f"{len(one.prompt)} tokens in, {len(one.tokens)} out, ended by {one.reason or 'itself'}")
