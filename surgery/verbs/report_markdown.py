# SPDX-License-Identifier: Apache-2.0
"""A savings report as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from surgery_formats.text import count, nbytes, show

if TYPE_CHECKING:
    from surgery.verbs.report import AdapterCost, BaseCost, SavingsReport, Split, TaskCost

__all__ = ["render"]

_PARTS = (("attention", "attention"), ("MLP", "mlp"), ("rest", "rest"))


def render(report: SavingsReport) -> str:
    """The whole report."""
    lines = ["# Savings", ""]
    if base := report.base:
        lines += [
            f"Base {_code(base.name)}: {_exact(base.parameters)} parameters, {nbytes(base.nbytes)} of weights.",
            "",
        ]
    if report.adapters:
        lines += _table(
            ("adapter", "kind", "trained parameters", "share of all", "weights", "share of a full copy"),
            (_adapter(cost) for cost in report.adapters),
        )
    for cost in report.adapters if report.base else ():
        lines += [f"## Tasks on one base: {_code(cost.name)}", "", *_tasks(cost.tasks)]
    if report.together:
        lines += ["## These adapters together", "", *_tasks((report.together,))]
    lines += ["## Where the parameters are", "", *_parts(report.base, report.adapters)]
    if warnings := [f"- {_code(cost.name)}: {show(text, 400)}" for cost in report.adapters for text in cost.warnings]:
        lines += ["## Warnings", "", *warnings, ""]
    return "\n".join(lines)


def _adapter(cost: AdapterCost) -> Sequence[str]:
    kind = f"{cost.format}, {show(cost.kind)}"
    return (
        _code(cost.name),
        kind,
        _exact(cost.trained),
        _percent(cost.share),
        nbytes(cost.nbytes),
        _percent(cost.nbytes_share),
    )


def _tasks(costs: Iterable[TaskCost]) -> list[str]:
    return _table(
        ("tasks", "full copies", "one base and adapters", "saved", "times smaller"),
        (
            (
                f"{cost.tasks}",
                nbytes(cost.copies_nbytes),
                nbytes(cost.shared_nbytes),
                nbytes(cost.saved_nbytes),
                f"{cost.times:.3g}",
            )
            for cost in costs
        ),
    )


def _parts(base: BaseCost | None, adapters: Sequence[AdapterCost]) -> list[str]:
    splits: list[tuple[str, Split, int]] = [("base", base.split, base.parameters)] if base else []
    splits += [(_code(cost.name), cost.split, cost.trained) for cost in adapters]
    rows = ((title, *(_part(getattr(split, field), total) for _, split, total in splits)) for title, field in _PARTS)
    return _table(("part", *(name for name, _, _ in splits)), rows)


def _part(number: int, total: int) -> str:
    return f"{count(number)} ({number / total:.1%})" if total else "0"


def _exact(number: int) -> str:
    return f"{count(number)} ({number})" if number >= 10_000 else f"{number}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.3%}"


def _code(name: str) -> str:
    """A name from a file as a code span that cannot end early or split a table's cell."""
    return f"`{show(name).replace('`', chr(39)).replace('|', '/')}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows), ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
