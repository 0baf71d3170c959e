# SPDX-License-Identifier: Apache-2.0
"""``surgery export-onnx``."""

from __future__ import annotations

from typing import Any

import click

from surgery_cli import options as option
from surgery_cli.options import Settings, complete_files, subcommand
from surgery_cli.output import show_result
from surgery_cli.pages import pages
from surgery_cli.progress import bar

__all__ = ["command"]


def _task(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    from surgery_formats.errors import FitError
    from surgery_formats.models.families.tasks import check_task

    try:
        check_task(value)
    except FitError as error:
        raise click.BadParameter(f"{error.message}; {error.hint}") from error
    return value


@subcommand("export-onnx")
@pages()
@click.argument("base", shell_complete=complete_files)
@option.adapters(required=False)
@option.output("Folder to make, or BASE's own folder, to which files are only added.", rehearsed=False)
@click.option(
    "--task",
    metavar="TASK",
    callback=_task,
    help="What the graph is for, as the Hub names it: text-classification, feature-extraction, fill-mask ...; by default "
    "what BASE was saved for.",
)
@option.choice(
    "--target",
    values=("cuda", "cpu", "portable"),
    default="cpu",
    help="Where it will run; portable: operators of ONNX only.",
)
@option.choice(
    "--dtype",
    values=("auto", "fp32", "fp16", "bf16"),
    help="Type of arithmetic, logits and cache; auto: BASE's where the target has it.",
)
@option.choice(
    "--weights",
    values=("auto", "reference", "link", "copy", "embed"),
    help="auto: reference if OUT is BASE's folder, else copy (blocks are shared where the file system can).",
)
@option.choice(
    "--layout",
    values=("plain", "transformers.js", "optimum", "sentence-transformers", "genai", "triton"),
    help="Names and places of files, as a program looks for them.",
)
@click.option(
    "--mode",
    type=click.Choice(["merged", "swappable", "prefix"]),
    help="Where every ADAPTER goes; by default a soft prompt goes in front, all else is merged.",
)
@click.option("--merge", multiple=True, type=option.weighted, metavar="A[=W]", help="Merge an adapter; repeatable.")
@click.option(
    "--swap",
    multiple=True,
    type=option.weighted,
    metavar="B[=W]",
    help="An adapter for slots: the graph is the base without it.",
)
@click.option(
    "--required",
    is_flag=True,
    help="Slots have no default, for runtimes that pass no optional inputs: JavaScript, Triton.",
)
@click.option(
    "--packed",
    is_flag=True,
    help="One slot for weights of the same input (q, k, v; gate and up), which is faster; clients fill it as a whole.",
)
@click.option("--prefix", multiple=True, metavar="C", help="A soft prompt in front; the first one is the default.")
@click.option("--bake-prompt", multiple=True, metavar="TEXT", help="A text in front, read once, now.")
@option.choice(
    "--prompt-form",
    values=("auto", "kv", "rows"),
    help="kv: keys and values, the default past; rows: token ids behind the vocabulary, for onnxruntime-genai.",
)
@option.choice(
    "--merge-to",
    values=("delta", "full"),
    help="delta: changed tensors beside BASE's file; full: all weights anew, laid out for graphs.",
)
@option.choice(
    "--weights-type",
    values=("stored", "int4", "int8", "fp8", "mixed"),
    help="int4, int8: codes in blocks, for MatMulNBits; mixed: of both, within --budget; fp8: small files that become numbers "
    "at load; stored: as BASE has them.",
)
@click.option(
    "--block", type=option.count(), default=32, show_default=True, help="Of codes: inputs that share a scale."
)
@click.option("--symmetric/--asymmetric", default=True, help="Of codes: without zero points (default), or with them.")
@option.choice("--scales", values=("minmax", "search"), help="Of codes: search: those of the least error.")
@click.option(
    "--rounding",
    type=click.Choice(["feedback", "nearest"]),
    help="Of codes: feedback (default with --calibration) makes up for errors along its inputs and a merged adapter's.",
)
@click.option("--calibration", metavar="FILE", help="Of codes: inputs to make up for errors along, as of extract-lora.")
@option.choice(
    "--embeddings",
    values=("auto", "keep", "int8", "int4"),
    help="Of codes: the token table; auto: as a head tied to it, else kept.",
)
@click.option("--budget", type=option.size, metavar="SIZE", help="Of mixed: most bytes of all weights, e.g. 700MB.")
@option.choice(
    "--linear",
    values=("auto", "matmul"),
    help="matmul: MatMul with weights of inputs by outputs, which onnxruntime's quantisers look for.",
)
@option.choice(
    "--experts",
    values=("auto", "fused", "apart"),
    help="auto: a layer's int4 codes in one QMoE on cpu; fused: stored weights in one MoE, too; apart: each by itself.",
)
@option.choice("--head", values=("auto", "keep", "int8", "int4"), help="Of codes: the head; auto: as the weights.")
@click.option(
    "--range-text",
    metavar="FILE",
    help="Measure on this text what a graph of fp16 stores, against its largest number; words: on tokens of BASE's own.",
)
@click.option("--max-length", type=option.count(), metavar="N", help="Longest sequence; default: as BASE.")
@click.option("--inputs-embeds", is_flag=True, help="A decoder takes embeddings; embed_tokens.onnx makes them of ids.")
@click.option("--position-ids", is_flag=True, help="Positions are an input of a decoder, as of other exporters.")
@click.option(
    "--opset",
    type=option.count(17, 23),
    metavar="N",
    help="Operators of ONNX's set N, for older runtimes; default: the least that the graph needs.",
)
@option.choice(
    "--logits",
    values=("auto", "all", "input"),
    help="input: num_logits_to_keep says of how many last positions logits are computed; auto: input, but for cuda.",
)
@option.engine
@option.verify("full: compare what was copied byte by byte too, and note the sha256 of every file.")
@option.overwrite()
def command(
    settings: Settings, base: str, adapters: tuple[tuple[str, float], ...], mode: str | None, **options: Any
) -> None:
    """Export a model as ONNX graphs that use its weight files as they are.

    OUT gets model.onnx, tokenizer and configuration, and genai_config.json, so that onnxruntime-genai runs the folder
    as it is. Adapters are merged into changed weights beside BASE's, put into slots (adapters/*.onnx_adapter), or stand
    in front of the text as keys and values (prompts/*.onnx_adapter).

    \b
    Examples:
      surgery export-onnx llama/ -o llama/            adds a graph of a few hundred kB
      surgery export-onnx llama/ -o out/ --target cuda
      surgery export-onnx llama/ style=0.7 my-prompt/ -o out/
      surgery export-onnx llama/ --swap sql/ --swap chat/ -o out/
      surgery export-onnx llama/ style/ --weights-type int4 -o out/   merged, then 4 bits
    """
    from surgery.verbs.export_onnx import export_onnx

    if mode is not None:
        if not adapters:
            raise click.UsageError(f"--mode {mode} is for adapters behind BASE, and there are none")
        role = {"merged": "merge", "swappable": "swap", "prefix": "prefix"}[mode]
        options[role], adapters = (*adapters, *options[role]), ()
    with bar(settings, "merging") as progress:
        result = export_onnx(base, adapters, progress=progress, **options)
    show_result("export-onnx", result, settings)
