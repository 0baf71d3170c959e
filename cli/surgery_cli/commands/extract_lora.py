# SPDX-License-Identifier: Apache-2.0
"""``surgery extract-lora``."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery_cli._tables import emit_json, note, pairs, table, warn
from surgery_cli.options import (
    Settings,
    complete_files,
    devices_option,
    dry_run_option,
    output_option,
    overwrite_option,
    rank_of,
    subcommand,
)
from surgery_cli.progress import bar
from surgery_formats.errors import FitError
from surgery_formats.text import count, listing, nbytes, show

if TYPE_CHECKING:
    from surgery.extraction.findings import CalibrationTotals
    from surgery.extraction.result import ExtractResult, Layers

__all__ = ["command"]


def _rank(text: str) -> int | str:
    """A number of directions, or ``auto``."""
    if text == "auto":
        return text
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:12]) <= 1 << 20:
        raise click.BadParameter(f"'{show(text, 40)}' is neither a number of at least 1 nor 'auto'")
    return int(text)


def _rank_pattern(text: str) -> tuple[str, int]:
    pattern, equals, number = text.rpartition("=")
    rank = _rank(number)
    if not equals or not pattern or not isinstance(rank, int):
        raise click.BadParameter(f"'{show(text, 40)}' is not PATTERN=N")
    return pattern, rank


def _share(text: str) -> float:
    """A number between 0 and 1; ``95%`` too."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise click.BadParameter(f"'{show(text, 40)}' does not lie between 0 and 1")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise click.BadParameter(f"'{show(text, 40)}' is not a number above 0")
    return value


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
@click.argument("base", shell_complete=complete_files)
@click.argument("tuned", shell_complete=complete_files)
@output_option("Folder to make, or file where FORMAT is a single file.")
@click.option("--rank", type=_rank, metavar="N|auto", help="Directions per matrix; 16 if nothing else is said.")
@click.option(
    "--rank-pattern",
    type=_rank_pattern,
    multiple=True,
    metavar="PATTERN=N",
    help="Another rank for some modules: 'mlp.*=32'; the first that matches holds.",
)
@click.option("--energy", type=_share, metavar="SHARE", help="Instead: share of each matrix' squared change to hold.")
@click.option(
    "--max-error", type=_share, metavar="SHARE", help="Instead: most that may be missing of each matrix' change."
)
@click.option(
    "--budget", type=_budget, metavar="SIZE", help="Instead: 20MB, or 2M parameters, shared out where it helps most."
)
@click.option(
    "--kind",
    type=click.Choice(["auto", "lora", "dora"]),
    default="auto",
    show_default=True,
    help="auto: DoRA where it leaves clearly less than a LoRA of as many parameters.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Inputs of modules (safetensors), for factors that are best on them.",
)
@click.option("--alpha", type=_positive, metavar="NUMBER", help="lora_alpha; default: the rank.")
@click.option("--rslora", is_flag=True, help="Scale by alpha / sqrt(rank).")
@click.option(
    "--dense",
    type=_dense,
    default="norm,bias",
    show_default=True,
    metavar="norm,bias|none",
    help="One-dimensional changes to keep.",
)
@click.option(
    "--embeddings",
    type=click.Choice(["lora", "full"]),
    default="lora",
    show_default=True,
    help="Form of embedding and head.",
)
@click.option(
    "--adapter-dtype",
    "dtype",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Stored type of the factors; auto: as TUNED.",
)
@click.option("--to", default="peft", show_default=True, metavar="FORMAT", help="See 'surgery formats'.")
@click.option("--factors", type=click.Choice(["int8", "int4"]), help="Store factors as codes: format compact.")
@click.option("--allow-loss", is_flag=True, help="Leave out what no form can hold.")
@devices_option
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Computing threads; by default one per core, at most 8; 3 for each GPU.",
)
@click.option("--table", is_flag=True, help="Show what ranks 4 to 64 cost and leave out, by layers.")
@dry_run_option("Compare and factorise; write nothing.")
@overwrite_option()
def command(settings: Settings, base: str, tuned: str, output: Path | None, dry_run: bool, **options: Any) -> None:
    """Extract a LoRA from a full fine-tune.

    TUNED minus BASE, each matrix by its best factors of the rank asked for, everything else as TUNED has it. What was written is
    read back and must hold what was measured against TUNED; a change that nothing holds is an error that names it.

    \b
    Examples:
      surgery extract-lora llama/ my-llama/ -o my-lora/
      surgery extract-lora llama/ my-llama/ -o my-lora/ --rank 64
      surgery extract-lora llama/ my-llama/ -o my-lora/ --rank 16 --rank-pattern 'self_attn.*=32'
      surgery extract-lora llama/ my-llama/ -o my-lora/ --budget 20MB
      surgery extract-lora llama/ my-llama/ -o my-lora/ --rank 64 --factors int4
    """
    from surgery.verbs.extract_lora import extract_lora
    from surgery_formats.refs import resolve

    if options["kind"] == "dora" and options["calibration"] is not None:
        raise click.UsageError("--calibration weights the factors of a LoRA; --kind dora makes none")
    ways = [name for name in ("rank", "energy", "max_error", "budget") if options[name] is not None]
    if len(ways) > 1 and not (set(ways) == {"rank", "budget"} and options["rank"] == "auto"):
        raise click.UsageError(f"only one of {' and '.join('--' + way.replace('_', '-') for way in ways)} can be given")
    patterns = dict(options.pop("rank_pattern"))
    if patterns and (ways not in ([], ["rank"]) or options["rank"] == "auto"):
        raise click.UsageError("--rank-pattern goes with a number as --rank")
    chosen = {name: options.pop(name) for name in ("rank", "energy", "max_error", "budget")}
    began = time.monotonic()
    with bar(settings, "extracting") as progress:
        result = extract_lora(
            resolve(base),
            resolve(tuned),
            output=output,
            rank=rank_of(**chosen, patterns=patterns),
            dry_run=dry_run,
            progress=progress,
            **options,
        )
    seconds = time.monotonic() - began
    if settings.json:
        where = None if result.output is None else str(result.output)
        timings = {name: round(value, 3) for name, value in result.timings.items()}
        emit_json(
            "extract-lora", {"output": where, "seconds": round(seconds, 3), "timings": timings, **result.as_json()}
        )
    elif dry_run or not settings.quiet:
        _text(result, output, seconds, settings)
    for text in result.warnings:
        warn(text)


def _text(result: ExtractResult, output: Path | None, seconds: float, settings: Settings) -> None:
    ranks = sorted({row.rank for row in result.rows if row.rank})
    spread = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no factors"
    times = f"{result.saved:.3g} times smaller" if result.saved >= 1 else f"{1 / result.saved:.3g} times larger"
    rows = [
        ("tensors", ", ".join(f"{number} {kind}" for kind, number in result.classes.items())),
        (
            "change",
            f"{result.moved:.1%} of the values moved; storage rounding makes up {result.noise:.1%} of the change",
        ),
        ("adapter", f"{spread}, {count(result.parameters)} parameters, {result.dtype}"),
        (
            "held",
            f"all but {result.residual:.2%} of the change"
            + (f"; {result.lost:.2%} of its energy was left out" if result.lost else ""),
        ),
        ("size", f"{nbytes(result.adapter_nbytes)}, {times} than the full copy's {nbytes(result.tuned_nbytes)}"),
    ]
    if result.kind is not None:
        rows.append(("kind", f"{'DoRA' if result.kind.kind == 'dora' else 'LoRA'}: {result.kind.why}"))
    if result.calibration is not None:
        rows.append(("calibration", _calibration(result.calibration)))
    if result.merged is not None:
        rows.append(("origin", result.merged.text))
    if not math.isnan(result.survival):
        rows.append(("merging", f"keeps {result.survival:.1%} of the factors' update in BASE's stored type"))
    if result.output is not None:
        rows.append(("proof", "read back: it holds what was measured against TUNED"))
        rows.append(("wrote", f"{show(output, 500)} in {seconds:.2f} s"))
    pairs(rows)
    told = [row for row in result.rows if row.energy or row.form]
    if told:
        from surgery.extraction.result import layers_of

        click.echo()
        layers = layers_of(told, apart=bool(settings.verbose))
        table(_HEADINGS, map(_cells, layers), right=range(1, 10), spare=_SPARE)
        remarks: dict[str, list[str]] = {}
        for one in layers:
            if one.why:
                remarks.setdefault(one.why, []).append(one.pattern)
        if remarks:
            click.echo()
            table(("layers", "remark"), ((listing(where, 2), why) for why, where in remarks.items()))
        if len(layers) < len(told):
            note("like-named layers are taken together; -v shows each")
    if result.table:
        click.echo()
        cells = (
            (str(c.rank), c.layers, f"{c.residual:.2%}", count(c.parameters), nbytes(c.nbytes)) for c in result.table
        )
        table(("rank", "layers", "missing", "parameters", "size"), cells, right=(0, 2, 3, 4))
    if result.output is None:
        note("dry run: nothing was written")


def _calibration(found: CalibrationTotals) -> str:
    bias = f"; {found.biases} biases make up for mean errors" if found.biases else ""
    return (
        f"weighted factors in {found.weighted} of {found.modules} modules: on these inputs {found.error:.2%} of what the change does "
        f"is missing, {found.plain:.2%} with plain factors{bias}"
    )


_HEADINGS = (
    "layers", "times", "rank", "share", "missing", "moved", "rms/ulp", "noise", "signal", "survives", "class",
)  # fmt: skip

_SPARE = tuple(map(_HEADINGS.index, ("moved", "rms/ulp", "noise", "class", "times", "survives")))


def _cells(one: Layers) -> tuple[str, ...]:
    survival = "" if math.isnan(one.survival) else f"{one.survival:.1%}"
    figures = (f"{one.share:.2%}", f"{one.residual:.2%}", f"{one.moved:.1%}", f"{one.rms_ulp:.2g}", f"{one.noise:.1%}")
    return (one.pattern, str(len(one.rows)), one.ranks, *figures, one.signal, survival, one.kind)
