# SPDX-License-Identifier: Apache-2.0
"""``surgery run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery_cli import interruption
from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, runtime_device_option, subcommand
from surgery_cli.output import show_result

__all__ = ["command"]

_TOGETHER = 8  # rows of a file, which may have thousands


@subcommand("run")
@click.argument("model", shell_complete=complete_files)
@click.option(
    "-p", "--prompt", "texts", multiple=True, metavar="TEXT", help="Text to go on from; several make a batch."
)
@click.option(
    "--pair",
    "pairs",
    nargs=2,
    multiple=True,
    metavar="A B",
    help="Two texts in one row: question and text, for example.",
)
@option.path(
    "--batch",
    metavar="FILE",
    help="Prompts, one on each line; .jsonl: objects with prompt, pair, ids or messages.",
)
@click.option(
    "--batch-size",
    type=option.count(),
    metavar="N",
    help=f"Most rows that run together; by default all, of a file {_TOGETHER}.",
)
@click.option("--chat", is_flag=True, help="A text is what a user says: it goes into the model's chat template.")
@click.option("--system", metavar="TEXT", default="", help="What the chat template is told besides; implies --chat.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Ends a row, and is cut off; repeatable.")
@click.option("--ids", multiple=True, metavar="1,5,9", callback=option.token_ids, help="Token ids instead of text.")
@option.path(
    "--audio",
    multiple=True,
    metavar="FILE",
    help="Instead of text, for models of speech: a .wav of 16 kHz, or a spectrogram (.npy).",
)
@option.path(
    "--images",
    multiple=True,
    metavar="FILE",
    help="Instead of text, for models of images: pixel_values (.npy).",
)
@click.option(
    "--start",
    metavar="1,5,9",
    callback=option.first_ids,
    help="First ids of an encoder-decoder's answer, instead of those of generation_config.json.",
)
@click.option("--max-new", type=option.count(0), default=128, show_default=True, help="Most new tokens.")
@click.option(
    "--temperature",
    type=option.number(least=0),
    metavar="NUMBER",
    default=0.0,
    show_default=True,
    help="0: the likeliest token.",
)
@click.option("--top-k", type=option.count(0), default=0, help="Only the k likeliest; 0: all.")
@click.option("--top-p", type=option.share, metavar="SHARE", default="1", help="Only the likeliest with this sum.")
@click.option("--seed", type=option.count(0), default=0, show_default=True, help="Of the draws.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="FILE",
    help=".onnx_adapter for the slots; several add up, unlike in onnxruntime. Or NAME: one exported with the graph, or inside. "
    "Either at a strength: FILE=0.5.",
)
@click.option("--prompt-adapter", metavar="FILE", help=".onnx_adapter with a soft prompt.")
@click.option("--no-prompt", is_flag=True, help="Leave out the soft prompt that is the graph's own.")
@option.path("--weights", metavar="DIR", help="Folder of the weight files.")
@option.threads("--threads", help="On the cpu; by default one per core.")
@runtime_device_option
def command(
    settings: Settings,
    model: str,
    texts: tuple[str, ...],
    pairs: tuple[tuple[str, str], ...],
    batch: Path | None,
    ids: tuple[tuple[int, ...], ...],
    no_prompt: bool,
    **options: Any,
) -> None:
    """Run an exported model: generate text, or classify it.

    MODEL is a folder with model.onnx, or an encoder-decoder's, or the file. Text needs the package tokenizers
    (pip install 'model-surgery[run]') and the tokenizer.json beside the graph; --ids needs neither. The graph says itself
    which padding and cache it takes.

    \b
    Examples:
      surgery run out/ -p "Once upon a time"
      surgery run out/ -p "Dear" --temperature 0.8 --top-p 0.95 --seed 7
      surgery run out/ -p "SELECT" --adapter sql.onnx_adapter=0.7
      surgery run out/ -p "Who wrote it?" --chat --stop "###"
      surgery run qa/ --pair "Who wrote it?" "It was written by ..."
      surgery run whisper/ --audio talk.wav
      surgery run vit/ --images cat.npy
    """
    from surgery.onnx.run.batch_file import read_batch
    from surgery.onnx.run.sampling import Sampling
    from surgery.reports.summary import Summary
    from surgery.verbs.run import run
    from surgery_formats.text import verbatim

    inputs: list[Any] = [*texts, *pairs, *ids, *(read_batch(batch) if batch is not None else [])]
    if not inputs and not options["audio"] and not options["images"]:
        raise click.UsageError(
            "nothing to run on; give -p TEXT, --pair, --batch, --ids, --audio or --images", click.get_current_context()
        )
    if options["prompt_adapter"] is not None and no_prompt:
        raise click.UsageError("--prompt-adapter and --no-prompt exclude each other", click.get_current_context())
    if batch is not None and options["batch_size"] is None:
        options["batch_size"] = _TOGETHER
    single = len(inputs or options["audio"] or options["images"]) == 1 and not settings.json

    def on_text(row: int, text: str) -> None:
        interruption.check()
        if single:
            click.echo(verbatim(text), nl=False)

    sampling = Sampling(*(options.pop(name) for name in ("temperature", "top_k", "top_p", "seed")))
    result = run(model, inputs, sampling=sampling, prompt=not no_prompt, on_text=on_text, **options)
    summary = result.summary(verbose=settings.verbose > 0)
    if single and result.texts[0].text is not None and result.texts[0].reason:  # it is on the screen already
        click.echo()
        summary = Summary(summary.title, summary.notes)
    show_result("run", result, settings, summary=summary, data=True)
