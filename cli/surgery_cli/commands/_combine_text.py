# SPDX-License-Identifier: Apache-2.0
"""What ``combine`` and ``resize`` have in common: how they run, what they show, and the type of their shares."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery_cli._tables import emit_json, goal, note, pairs, table, warn
from surgery_cli.options import Settings
from surgery_cli.progress import bar
from surgery_formats.text import nbytes, show

if TYPE_CHECKING:
    from surgery.verbs.combine import CombineResult

__all__ = ["run", "share"]

_LISTED = 20  # modules, those with the greatest errors; all of them with -v


def share(text: str) -> float:
    """A number above 0, at most 1: ``.95`` or ``95%``.

    Raises:
        click.BadParameter: anything else.
    """
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        raise click.BadParameter(f"'{show(text)}' is not a share between 0 and 1")
    return number


def run(
    call: Callable[..., CombineResult], doing: str, output: Path | None, settings: Settings, *, dry_run: bool
) -> None:
    """Do it, and show what came out.

    Args:
        call: The library's function with everything but ``dry_run`` and ``progress``.
        doing: What the progress bar says.
        output: As it was asked for; None for a dry run.
        settings: Of the command.
        dry_run: Whether nothing is to be written.
    """
    began = time.monotonic()
    with bar(settings, doing) as progress:
        result = call(dry_run=dry_run, progress=progress)
    seconds = time.monotonic() - began
    if settings.json:
        emit_json(result.verb, _as_json(result, seconds))
    elif dry_run or not settings.quiet:
        _text(result, output, seconds, settings)
    for one in result.warnings:
        warn(one)


def _as_json(result: CombineResult, seconds: float) -> dict[str, Any]:
    """The document's result."""
    where = None if result.output is None else str(result.output)
    return {"output": where, "seconds": round(seconds, 3), **result.as_json()}


def _text(result: CombineResult, output: Path | None, seconds: float, settings: Settings) -> None:
    """The summary, then the modules that lost most."""
    outcomes = Counter(one.outcome for one in result.modules)
    sources = [
        f"{show(one.name)} ({one.format})" + (f" x {one.weight:g}" if one.weight != 1 else "") for one in result.sources
    ]
    rows = [(result.verb, " + ".join(sources)), ("to", goal(output, result.target))]
    if result.method != "exact":
        rows.append(("method", result.method))
    rows.append(("modules", ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())))
    rows.append(
        (
            "rank",
            f"{_spread(Counter(sum(one.ranks) for one in result.modules))} -> {_spread(Counter(one.rank for one in result.modules))}",
        )
    )
    if result.error is not None:
        rows.append(
            ("error", f"{result.error:.3g} of the whole delta's norm" + ("" if result.output else " (expected)"))
        )
    if result.output is not None:
        rows.append(("wrote", f"{nbytes(_size(result.output))} in {seconds:.2f} s"))
    pairs(rows)
    worst = sorted((one for one in result.modules if one.error), key=lambda one: -(one.error or 0.0))
    shown = (
        list(result.modules) if settings.verbose else [one for one in worst if one.outcome == "approximated"][:_LISTED]
    )
    if shown:
        click.echo()
        table(
            ("module", "outcome", "ranks", "rank", "norm", "error", "best"),
            (
                (
                    one.site,
                    one.outcome,
                    "+".join(map(str, one.ranks)),
                    one.rank or "",
                    *map(_number, (one.norm, one.error, one.optimum)),
                )
                for one in shown
            ),
            right=(3, 4, 5, 6),
        )
    hidden = outcomes["approximated"] - sum(one.outcome == "approximated" for one in shown)
    if hidden > 0:
        note(f"... and {hidden} more; -v shows all")
    if result.output is None:
        note("dry run: nothing was written")


def _spread(counts: Mapping[int, int]) -> str:
    ranks = sorted(rank for rank in counts if rank)
    return "none" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
