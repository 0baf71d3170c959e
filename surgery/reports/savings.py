# SPDX-License-Identifier: Apache-2.0
"""The cost of adapters beside their base, and their savings against full copies of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.reports.base_choice import BaseChoice, choice_sections
from surgery.reports.drawings import Bars, Lines
from surgery.reports.quantisation import QuantisedWeights, quantised_phrase
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Chart, Column, Facts, Note, Section, Table
from surgery.reports.summary import Summary
from surgery.reports.to_json import plain, without_empty
from surgery.reports.values import Cell, Name, Phrase, Value
from surgery_formats.text import numbered

__all__ = ["AdapterCost", "BaseCost", "SavingsReport", "Split", "TaskCost"]


_PARTS: Mapping[str, str] = {
    "attention": "attention",
    "mlp": "mlp",
    "expert": "mlp",
    "attention+mlp": "both",
    "modulation": "modulation",
    "other": "untold",
}


@dataclass(frozen=True, slots=True)
class Split:
    """Numbers by what they are part of.

    Attributes:
        attention: Of attention, its norms apart.
        mlp: Of feed-forward layers, experts included.
        rest: Embeddings, heads, norms, convolutions, virtual tokens.
        both: Of matrices that hold rows or columns of both, as in Flux's single blocks.
        modulation: Of what turns the time into shifts and scales of a diffusion network's blocks.
        untold: Of names that tell no part: the others are at least what they are here.
    """

    attention: int = 0
    mlp: int = 0
    rest: int = 0
    both: int = 0
    modulation: int = 0
    untold: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.attention + self.mlp + self.both + self.modulation + self.rest + self.untold

    def plus(self, role: str, number: int) -> Split:
        """A copy with `number` more of `role`."""
        part = _PARTS.get(role, "rest")
        return replace(self, **{part: getattr(self, part) + number})


@dataclass(frozen=True, slots=True)
class TaskCost:
    """So many tasks, each as a full copy of the base, or as adapters on one base.

    Attributes:
        tasks: How many.
        copies_nbytes: Bytes of as many full copies.
        shared_nbytes: Bytes of one base and the adapters.
        saved_nbytes: The difference; negative where a single adapter comes on top of its base.
        times: How many times smaller.
        copies_parameters: Numbers in as many full copies.
        shared_parameters: Numbers in one base and the adapters.
    """

    tasks: int
    copies_nbytes: int
    shared_nbytes: int
    saved_nbytes: int
    times: float
    copies_parameters: int
    shared_parameters: int


@dataclass(frozen=True, slots=True)
class BaseCost:
    """A base.

    Attributes:
        path: What was opened.
        name: Its file or folder name.
        parameters: Numbers stored, ties counted once, buffers not at all.
        nbytes: Of its weight files, as the file system counts them.
        split: `parameters` by part.
        quantised: Its weights that are stored as codes, by format; of a pipeline, those of every component.
        warnings: What the user should know.
    """

    path: Path
    name: str
    parameters: int
    nbytes: int
    split: Split
    quantised: tuple[QuantisedWeights, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterCost:
    """An adapter beside its base.

    Attributes:
        path: What was opened.
        name: Its file or folder name.
        format: ``peft``, ``kohya``, ``mlx``.
        kind: ``LORA`` ...
        trained: Numbers trained.
        total: Numbers of base and adapter together while training, as PEFT counts them: a module trained in full is
            there twice, its original and its copy. None without a base.
        share: ``trained / total``.
        carried: Numbers in the file that were not trained.
        nbytes: Of its weight files, as the file system counts them.
        nbytes_share: ``nbytes`` of those of the base.
        split: `trained` by part.
        tasks: One base with so many adapters like this, against as many copies.
        warnings: What the user should know.
    """

    path: Path
    name: str
    format: str
    kind: str
    trained: int
    total: int | None
    share: float | None
    carried: int
    nbytes: int
    nbytes_share: float | None
    split: Split
    tasks: tuple[TaskCost, ...]
    warnings: tuple[str, ...] = ()


@summarised
@dataclass(frozen=True)
class SavingsReport:
    """What adapters cost and save.

    Attributes:
        base: The base, or None if none was given.
        adapters: In the order given.
        choices: Of each adapter, which of two bases it belongs to, if another one was named.
        together: All these adapters on one base against as many copies; None for fewer than two, or without a base.
        seconds: How long it took.
    """

    base: BaseCost | None
    adapters: tuple[AdapterCost, ...]
    together: TaskCost | None = None
    choices: tuple[BaseChoice, ...] = ()
    seconds: float = elapsed()

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of the base and of every adapter, with its name."""
        return tuple(f"{cost.name}: {text}" for cost in self._costs for text in cost.warnings)

    @property
    def _costs(self) -> tuple[BaseCost | AdapterCost, ...]:
        return (*([self.base] if self.base else []), *self.adapters)

    @property
    def nbytes(self) -> int:
        """Size of the weight files of base and adapters."""
        return sum(cost.nbytes for cost in self._costs)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        found = plain(self)
        if found["base"]:
            found["base"] = without_empty(found["base"], ("quantised", "warnings"))
        return {"type": "savings", **without_empty(found, ("choices",))}

    def as_markdown(self) -> str:
        """Tables for a model card; the same bytes for the same files."""
        return self.summary().as_markdown()

    def summary(self, *, verbose: bool = False) -> Summary:
        """Sizes, what the parameters are part of, and so many tasks on one base against as many copies."""
        sections: list[Section] = []
        if self.base is not None:
            sizes = Value(self.base.parameters, "count"), " parameters, ", Value(self.base.nbytes, "bytes")
            facts: list[tuple[str, Phrase]] = [("base", (Name(self.base.name), ": ", *sizes))]
            facts += [("quantised", quantised_phrase(self.base.quantised))] if self.base.quantised else []
            sections.append(Facts(tuple(facts)))
        if self.adapters:
            sections.append(Table(_ADAPTERS, tuple(map(_adapter, self.adapters)), "Adapters"))
        splits = [(self.base.name, self.base.split, self.base.parameters)] if self.base else []
        splits += [(cost.name, cost.split, cost.trained) for cost in self.adapters]
        sections.append(_split_table(splits))
        if rows := tuple(self._tasks()):
            sections.append(_tasks_chart(rows))
        sections += [section for choice in self.choices for section in choice_sections(choice)]
        warnings = (Note((Name(cost.name), ": ", text), "warning") for cost in self._costs for text in cost.warnings)
        return Summary("Savings", (*sections, *warnings))

    def _tasks(self) -> Iterator[tuple[Cell, ...]]:
        costs: list[tuple[Phrase, TaskCost]] = [
            (Name(cost.name), task) for cost in self.adapters for task in cost.tasks
        ]
        costs += [("these adapters together", self.together)] if self.together else []
        for name, cost in costs:
            yield cost.tasks, name, cost.copies_nbytes, cost.shared_nbytes, cost.saved_nbytes, cost.times


_ADAPTERS = (
    Column("adapter", "name"), Column("kind", "name"), Column("trained", "count"), Column("share", "share", 3),
    Column("bytes", "bytes"), Column("of a copy", "share", 3),
)  # fmt: skip
_SPLITS = {
    "attention": "attention",
    "mlp": "MLP",
    "both": "both in one",
    "modulation": "modulation",
    "rest": "rest",
    "untold": "not told",
}
_TASKS = (
    Column("tasks", "integer"), Column("adapter"), Column("full copies", "bytes"),
    Column("one base and adapters", "bytes"), Column("saved", "bytes"), Column("times smaller", "number", 3),
)  # fmt: skip


def _tasks_chart(rows: tuple[tuple[Any, ...], ...]) -> Chart:
    """Bytes for so many tasks; of one number of them there is no line to draw."""
    tasks = {row[0] for row in rows}
    several = len(tasks) > 1
    drawing = (
        Lines(x=0, y=(2, 3), by=1, log_x=True, log_y=True, label="bytes") if several else Bars(label=1, values=(2, 3))
    )
    of = "so many tasks" if several else numbered(rows[0][0], "task")
    return Chart(f"Storage for {of}", Table(_TASKS, rows), drawing)


def _adapter(cost: AdapterCost) -> tuple[Cell, ...]:
    return cost.name, f"{cost.format} {cost.kind}", cost.trained, cost.share, cost.nbytes, cost.nbytes_share


def _split_table(splits: Sequence[tuple[str, Split, int]]) -> Table:
    """A row per model or adapter; columns that few models have only where one of these has them."""
    shown = [
        part
        for part in _SPLITS
        if part in ("attention", "mlp", "rest") or any(getattr(split, part) for _, split, _ in splits)
    ]
    columns = Column("where", "name"), *(Column(_SPLITS[part], "figure") for part in shown)
    rows = tuple((name, *(_part(split, part, total) for part in shown)) for name, split, total in splits)
    return Table(columns, rows, "What the parameters are part of")


def _part(split: Split, part: str, total: int) -> Phrase:
    number = getattr(split, part)
    if not number and split.untold:
        return "not told"
    return (Value(number, "count"), " (", Value(number / total, "share", 1), ")") if total else "0"
