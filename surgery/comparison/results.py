# SPDX-License-Identifier: Apache-2.0
"""The results of a comparison, and their summaries."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from surgery.comparison.diff_charts import module_charts, tensor_charts
from surgery.comparison.entries import ModuleDiff, Profile, TensorDiff, TensorHeader
from surgery.comparison.quantisation_loss import QuantisationLoss
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Column, Facts, Note, Section, Table
from surgery.reports.selective import SelectiveTuning
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.to_json import plain, without_empty
from surgery.reports.values import Cell, Name, Phrase, Sides, Value

__all__ = [
    "AdapterDiff", "CheckpointDiff", "sides", "tensor_sections",
]  # fmt: skip

Entry = TypeVar("Entry", "ModuleDiff", "TensorDiff")

_LISTED = 30  # differences shown, the greatest first, unless all are asked for


@summarised
@dataclass(frozen=True)
class AdapterDiff:
    """Two adapters.

    Attributes:
        facts: ``{what: (A's, B's)}`` of format, kind, base and trained parameters.
        modules: Every weight that one of them touches.
        difference: Over all weights together, relative to A; None where no deltas were compared, or only what is no
            delta differs.
        header: Whether values were left unread.
        notes: What the user should know.
        names: What A and B are called.
        seconds: How long it took.
    """

    facts: Mapping[str, tuple[str, str]]
    modules: tuple[ModuleDiff, ...]
    difference: float | None
    header: bool
    notes: tuple[str, ...] = ()
    names: tuple[str, str] = ("", "")
    seconds: float = elapsed()
    nbytes: ClassVar[int] = 0  # not counted for this verb

    @property
    def equal(self) -> bool:
        """Whether the two do the same to every weight."""
        return all(entry.status == "equal" for entry in self.modules)

    @property
    def same_structure(self) -> bool:
        """Whether they touch the same weights, by the same kinds of updates."""
        return all(
            entry.a and entry.b and (entry.a.kind, entry.a.shape) == (entry.b.kind, entry.b.shape)
            for entry in self.modules
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes."""
        return self.notes

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        found = without_empty(plain(self), ("conflict",))
        return {"type": "adapters", "equal": self.equal, "same_structure": self.same_structure, **found}

    def summary(self, *, verbose: bool = False) -> Summary:
        """Facts of both, then the weights that differ, or all of them if `verbose`."""
        facts: list[tuple[str, Phrase]] = [
            (name, Name(a or "none") if a == b else (Name(a or "none"), " | ", Name(b or "none")))
            for name, (a, b) in self.facts.items()
            if a or b or name != "base"
        ]
        facts = [*sides(self.names), *facts]
        counted = _counted("weights", (module.status for module in self.modules), self.difference)
        shown = _chosen(self.modules, verbose)
        table = _table(_MODULES, map(_module, shown))
        left = _left(self.modules, shown)
        charts = module_charts(self.modules)
        return Summary("Differences", (Facts((*facts, *counted)), *table, *left, *charts, *warning_notes(self.notes)))


@summarised
@dataclass(frozen=True)
class CheckpointDiff:
    """Two checkpoints.

    Attributes:
        tensors: All of both, in order of names.
        difference: ``||B - A||_F / ||A||_F`` over all tensors whose values differ; None where no values were compared,
            or where those of some weights could not be.
        moved: Share of all compared values that differ, likewise.
        header: Whether values were left unread.
        quantisation: By the formats of both sides, the error of weights that one side stores as codes.
        notes: Why weights were not compared.
        tuned: Which part of A changed, where that has a name (docs/insert.md).
        names: What A and B are called.
        seconds: How long it took.
    """

    tensors: tuple[TensorDiff, ...]
    difference: float | None
    moved: float | None
    header: bool
    quantisation: tuple[QuantisationLoss, ...] = ()
    notes: tuple[str, ...] = ()
    tuned: SelectiveTuning | None = None
    names: tuple[str, str] = ("", "")
    seconds: float = elapsed()
    nbytes: ClassVar[int] = 0  # not counted for this verb

    @property
    def equal(self) -> bool:
        """Whether every tensor is."""
        return all(entry.status == "equal" for entry in self.tensors)

    @property
    def same_structure(self) -> bool:
        """Whether the same tensors are there, of the same types and shapes."""
        return all(entry.status in ("equal", "values") for entry in self.tensors)

    @property
    def not_compared(self) -> int:
        """Number of weights whose values could not be compared."""
        return sum(entry.status == "not compared" for entry in self.tensors)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes; what differs is the result."""
        return self.notes

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        found = without_empty(plain(self), ("quantisation", "notes", "rounding", "nearest", "tuned", "intruders"))
        found |= {} if self.tuned is None else {"tuned": self.tuned.as_json()}
        return {"type": "checkpoints", "equal": self.equal, "same_structure": self.same_structure, **found}

    def summary(self, *, verbose: bool = False) -> Summary:
        """The totals, then the tensors that differ, or all of them if `verbose`."""
        counted = _counted("tensors", (tensor.status for tensor in self.tensors), self.difference)
        facts = [*sides(self.names), *counted]
        if self.moved is not None:
            facts.append(("moved", (Value(self.moved, "share", 3), " of the values")))
        if self.tuned is not None:
            facts.append(("tuned", self.tuned.phrase))
        if self.not_compared:
            plural = "s" if self.not_compared > 1 else ""
            facts.append(("not compared", f"{self.not_compared} weight{plural}, so that there is no total"))
        facts += [("quantisation", error.phrase) for error in self.quantisation]
        if self.header:
            facts.append(("compared", "headers only"))
        tensors = tensor_sections(self.tensors, verbose=verbose)
        charts = tensor_charts(self.tensors)
        return Summary("Differences", (Facts(tuple(facts)), *tensors, *charts, *warning_notes(self.notes)))


_MODULES = (
    Column("weight", "name"), Column("status"), Column("difference", "number", 3), Column("cosine", "number", 3),
    Column("rank", "integer"),
    Column("scale", "number", 3), Column("norm", "number", 3), Column("90 % in", "figure"), Column("note"),
)  # fmt: skip
_TENSORS = (
    Column("tensor", "name"), Column("status"), Column("A"), Column("B"), Column("relative", "number", 3),
    Column("greatest", "number", 3, spare=2), Column("moved", "share", spare=1), Column("90 % in", "figure"),
    Column("intruders", "integer"),
    Column("note"),
)  # fmt: skip


def sides(names: tuple[str, str]) -> list[tuple[str, Phrase]]:
    """What A and B are called, where that is known."""
    return [(side, Name(name)) for side, name in zip("AB", names, strict=True) if name]


def _counted(what: str, statuses: Iterable[str], difference: float | None) -> list[tuple[str, Phrase]]:
    counts = Counter(statuses)
    rows: list[tuple[str, Phrase]] = [
        (what, ", ".join(f"{number} {status}" for status, number in counts.items()) or "none")
    ]
    if difference is not None:
        rows.append(("difference", (Value(difference, "number", 3), " of A's norm")))
    return rows


def _module(module: ModuleDiff) -> tuple[Cell, ...]:
    a, b = module.a, module.b
    return (
        module.name,
        module.status,
        module.difference,
        module.cosine,
        Sides(a and a.rank, b and b.rank),
        Sides(a and a.scale, b and b.scale),
        Sides(a and a.norm, b and b.norm),
        Sides(a and _ninety(a.profile), b and _ninety(b.profile)),
        module.note,
    )


def _tensor(tensor: TensorDiff) -> tuple[Cell, ...]:
    values = tensor.values
    numbers: tuple[Cell, ...] = (None,) * 5
    if values is not None:
        numbers = values.relative, values.max_abs, values.moved, _ninety(values.profile), values.intruders
    odd = f"{values.not_finite} values are not finite" if values and values.not_finite else ""
    return tensor.name, tensor.status, _header(tensor.a), _header(tensor.b), *numbers, tensor.note or odd


def _header(header: TensorHeader | None) -> Phrase:
    return "" if header is None else (f"{header.dtype} ", Value(header.shape, "shape"))


def _ninety(profile: Profile | None) -> str | None:
    """Directions that hold nine tenths of a delta's energy."""
    if profile is None:
        return None
    needed = profile.ranks["0.9"]
    return "many" if needed is None else str(needed)


def tensor_sections(tensors: Sequence[TensorDiff], *, verbose: bool) -> list[Section]:
    """The tensors that differ, the greatest difference first, or all of them."""
    shown = _chosen(tensors, verbose)
    return [*_table(_TENSORS, map(_tensor, shown)), *_left(tensors, shown)]


def _table(columns: tuple[Column, ...], rows: Iterable[tuple[Cell, ...]]) -> list[Section]:
    cells = tuple(rows)
    return [Table(columns, cells, f"Differences by {columns[0].heading}")] if cells else []


def _chosen(entries: Sequence[Entry], verbose: bool) -> Sequence[Entry]:
    """All, or what differs: the greatest difference first, structure before values."""
    if verbose:
        return entries
    return sorted((entry for entry in entries if entry.status != "equal"), key=lambda entry: -_size(entry))[:_LISTED]


def _size(entry: ModuleDiff | TensorDiff) -> float:
    """The key to sort by difference; a difference of structure ranks above any difference of values."""
    if isinstance(entry, TensorDiff):
        return math.inf if entry.values is None else entry.values.relative
    return math.inf if entry.difference is None else entry.difference


def _left(entries: Sequence[Entry], shown: Sequence[Entry]) -> list[Section]:
    more = sum(entry.status != "equal" for entry in entries) - len(shown)
    return [Note(f"... and {more} more", "omitted")] if more > 0 else []
