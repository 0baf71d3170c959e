# SPDX-License-Identifier: Apache-2.0
"""``surgery diff``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import click

from surgery_cli.options import Settings, complete_files
from surgery_cli.options import command as sub_command
from surgery_cli.output import emit_json, note, pairs, table, warn
from surgery_cli.progress import bar
from surgery_formats.text import show

if TYPE_CHECKING:
    from surgery.comparison.adapters import AdapterDiff, ModuleDiff, Profile, Side
    from surgery.comparison.checkpoints import CheckpointDiff, TensorDiff, TensorHeader

__all__ = ["FINDINGS", "command"]

One = TypeVar("One", "ModuleDiff", "TensorDiff")

FINDINGS = 6
"""Exit code: the comparison worked, and found what ``--fail-on`` names."""
_LISTED = 30  # differences shown, the greatest first; everything with -v


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise click.BadParameter(f"'{show(text)}' is not a number of at least 0")
    return value


@sub_command("diff")
@click.argument("a", metavar="A", shell_complete=complete_files)
@click.argument("b", metavar="B", shell_complete=complete_files)
@click.option("--header", is_flag=True, help="Names, types and shapes alone; no value is read.")
@click.option("--spectrum", is_flag=True, help="Of models: how each difference spreads over directions.")
@click.option(
    "--tolerance",
    type=_tolerance,
    metavar="X",
    help="Relative difference that counts as none; default: 0 for models, 1e-6 for adapters.",
)
@click.option(
    "--fail-on",
    type=click.Choice(["any", "structure"]),
    help="End with exit code 6 on any difference, or on one of names, types or shapes.",
)
def command(
    settings: Settings, a: str, b: str, header: bool, spectrum: bool, tolerance: float | None, fail_on: str | None
) -> None:
    """Show what differs between two models or two adapters.

    Models are compared tensor by tensor. Adapters are compared by what they add to each weight, whatever their format, rank and
    factors: no delta is formed, and no base is needed.

    \b
    Examples:
      surgery diff base/ tuned/
      surgery diff my-lora/ my-lora.safetensors
      surgery diff base/ merged/ --fail-on structure --header
    """
    from surgery.comparison.adapters import AdapterDiff
    from surgery.verbs.diff import diff
    from surgery_formats.refs import resolve

    paths = resolve(a), resolve(b)
    with bar(settings, "comparing") as progress:
        found = diff(*paths, header=header, spectrum=spectrum, tolerance=tolerance, progress=progress)
    if settings.json:
        emit_json("diff", found.as_json())
    elif isinstance(found, AdapterDiff):
        _adapters(found, settings)
    else:
        _checkpoints(found, settings)
    if isinstance(found, AdapterDiff):
        for text in found.notes:
            warn(text)
    if (fail_on == "any" and not found.equal) or (fail_on == "structure" and not found.same_structure):
        raise click.exceptions.Exit(FINDINGS)


def _summary(statuses: Counter[str], what: str, difference: float | None) -> list[tuple[str, str]]:
    rows = [(what, ", ".join(f"{number} {status}" for status, number in statuses.items()) or "none")]
    if difference is not None:
        rows.append(("difference", f"{difference:.3g} of A's norm"))
    return rows


def _adapters(found: AdapterDiff, settings: Settings) -> None:
    rows = [
        (name, show(mine or "none") if mine == theirs else f"{show(mine or 'none')} | {show(theirs or 'none')}")
        for name, (mine, theirs) in found.facts.items()
    ]
    pairs([*rows, *_summary(Counter(one.status for one in found.modules), "weights", found.difference)])
    shown = _chosen(found.modules, settings)
    if shown:
        click.echo()
        table(
            ("weight", "status", "difference", "cosine", "rank", "scale", "norm", "90 % in", "note"),
            (_module(one) for one in shown),
            right=(2, 3, 4, 5, 6, 7),
        )
    _more(len([one for one in found.modules if one.status != "equal"]), len(shown))


def _module(one: ModuleDiff) -> tuple[str, ...]:
    sides = (one.a, one.b)
    return (
        one.name,
        one.status,
        _number(one.difference),
        _number(one.cosine),
        _both([_rank(side) for side in sides]),
        _both([_number(side.scale if side else None) for side in sides]),
        _both([_number(side.norm if side else None) for side in sides]),
        _both([_ninety(side.profile if side else None) for side in sides]),
        one.note,
    )


def _rank(side: Side | None) -> str:
    return "" if side is None or side.rank is None else str(side.rank)


def _ninety(profile: Profile | None) -> str:
    if profile is None:
        return ""
    needed = profile.ranks["0.9"]
    return "many" if needed is None else str(needed)


def _both(texts: list[str]) -> str:
    one, other = texts
    return one if one == other else f"{one or '-'} | {other or '-'}"


def _checkpoints(found: CheckpointDiff, settings: Settings) -> None:
    rows = _summary(Counter(one.status for one in found.tensors), "tensors", found.difference)
    if found.moved is not None:
        rows.append(("moved", f"{found.moved:.3%} of the values"))
    if found.header:
        rows.append(("compared", "headers only"))
    pairs(rows)
    shown = _chosen(found.tensors, settings)
    if shown:
        click.echo()
        table(
            ("tensor", "status", "A", "B", "relative", "greatest", "moved", "90 % in", "note"),
            (_tensor(one) for one in shown),
            right=(4, 5, 6, 7),
            spare=(5, 6),
        )
    _more(len([one for one in found.tensors if one.status != "equal"]), len(shown))


def _tensor(one: TensorDiff) -> tuple[str, ...]:
    values = one.values
    numbers = ("", "", "", "")
    if values is not None:
        numbers = _number(values.relative), _number(values.max_abs), f"{values.moved:.2%}", _ninety(values.profile)
    odd = f"{values.not_finite} values are not finite" if values and values.not_finite else ""
    return one.name, one.status, _header(one.a), _header(one.b), *numbers, one.note or odd


def _header(header: TensorHeader | None) -> str:
    return "" if header is None else f"{header.dtype} {'x'.join(map(str, header.shape)) or 'scalar'}"


def _chosen(every: Sequence[One], settings: Settings) -> list[One]:
    """All with -v; else what differs, the greatest difference first, structure before values."""
    if settings.verbose:
        return list(every)
    return sorted((one for one in every if one.status != "equal"), key=lambda one: -_size(one))[:_LISTED]


def _size(one: ModuleDiff | TensorDiff) -> float:
    """What is structure, and has no size, is greater than any difference of values."""
    values = getattr(one, "values", None)
    found: float | None = values.relative if values is not None else getattr(one, "difference", None)
    return math.inf if found is None else found


def _more(every: int, shown: int) -> None:
    if every > shown:
        note(f"... and {every - shown} more; -v shows all")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
