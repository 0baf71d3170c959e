# SPDX-License-Identifier: Apache-2.0
"""The result of `surgery.locate`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from surgery.onnx.locate.pieces import LocatedPiece
from surgery.onnx.locate.search import Located
from surgery.reports.result import elapsed, summarised
from surgery_formats.tensors.views import Index

if TYPE_CHECKING:
    from surgery.reports.summary import Summary

__all__ = ["LocateResult"]

_FIRST = 12  # rows of a table, unless all are asked for


@summarised
@dataclass(frozen=True)
class LocateResult:
    """Which weights of a base a graph holds, and where.

    Attributes:
        path: The graph.
        base: The base.
        located: Everything that was found.
        warnings: What the user should know.
        seconds: How long it took.
    """

    path: Path
    base: Path
    located: Located
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()
    nbytes: ClassVar[int] = 0  # it only reads

    @property
    def complete(self) -> bool:
        """Whether every weight of the base is in the graph wholly."""
        return not self.located.missing

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        found = self.located
        tensors: dict[str, list[dict[str, Any]]] = {}
        for piece in found.pieces:
            tensors.setdefault(piece.place.name, []).append(_piece(piece))
        return {
            "graph": str(self.path),
            "base": str(self.base),
            "complete": self.complete,
            "weights": len(found.weights),
            "whole": len(found.whole),
            "missing": {weight.label: round(found.covered[weight.label], 6) for weight in found.missing},
            "tensors": tensors,
            "tables": dict(found.tables),
            "near": [
                {**_piece(near.piece), "tensor": near.piece.place.name, "distance": round(near.distance, 6)}
                for near in found.near
            ],
            "others": list(found.others),
            "warnings": list(self.warnings),
        }

    def summary(self, *, verbose: bool = False) -> Summary:
        """How much was found and how it lies; of every tensor if `verbose`."""
        from surgery.reports.output import PATH
        from surgery.reports.sections import Column, Facts, Note, Section, Table
        from surgery.reports.summary import Summary, warning_notes
        from surgery.reports.values import Name, NameList, Phrase, Value

        found = self.located
        numel = sum(weight.rows * weight.cols for weight in found.weights)
        whole = sum(weight.rows * weight.cols for weight in found.whole)
        share = Value(whole / max(numel, 1), "share")
        facts: list[tuple[Phrase, Phrase]] = [
            ("graph", Name(self.path, PATH)),
            ("base", Name(self.base, PATH)),
            ("found", (f"{len(found.whole)} of {len(found.weights)} weights, ", share, " of the values, all compared")),
            ("layouts", _layouts(found.pieces)),
        ]
        if found.missing:
            facts.append(("not found", NameList(tuple(weight.label for weight in found.missing))))
        for what, names in _by_kind(found.tables).items():
            facts.append((what, NameList(names, 3)))
        if found.others:
            facts.append(("not known", NameList(found.others, 3)))
        rows = [(piece.weight.label, piece.place.name, piece.how) for piece in found.pieces]
        columns = (Column("weight", "name"), Column("tensor of the graph", "name"), Column("how"))
        shown = rows if verbose else rows[:_FIRST]
        sections: list[Section] = [Facts(tuple(facts))]
        if shown:
            sections.append(Table(columns, tuple(shown)))
        if len(shown) < len(rows):
            sections.append(Note(f"... and {len(rows) - len(shown)} more pieces", "omitted"))
        if found.near:
            changed = [(near.piece.weight.label, near.piece.place.name, near.distance) for near in found.near]
            heading = (
                Column("other values than", "name"),
                Column("tensor of the graph", "name"),
                Column("distance", "share"),
            )
            sections.append(Table(heading, tuple(changed if verbose else changed[:_FIRST])))
        return Summary("Located weights", (*sections, *warning_notes(self.warnings)))


def _layouts(pieces: tuple[LocatedPiece, ...]) -> str:
    """``112 transposed, 33 as it is``."""
    counts = Counter(piece.how for piece in pieces)
    by_words: Counter[str] = Counter()
    for how, number in counts.items():
        words = [word for word in how.split(", ") if not word.startswith(("rows ", "columns ", "elements ", "within"))]
        by_words[", ".join(words) or "beside others"] += number
    return "; ".join(f"{number} {how}" for how, number in by_words.most_common(6)) or "none"


def _by_kind(tables: Any) -> dict[str, tuple[str, ...]]:
    kinds: dict[str, list[str]] = {}
    for name, what in tables.items():
        kinds.setdefault(what, []).append(name)
    return {what: tuple(names) for what, names in kinds.items()}


def _piece(piece: LocatedPiece) -> dict[str, Any]:
    facts: dict[str, Any] = {"weight": piece.weight.label, "how": piece.how}
    if not isinstance(piece.graph_rows, range) or len(piece.graph_rows) != piece.weight.rows:
        facts["columns" if piece.turned else "rows"] = _index(piece.graph_rows)
    if piece.also:
        facts["also"] = [weight.label for weight in piece.also]
    return facts


def _index(index: Index) -> list[int] | dict[str, int]:
    """A run by its ends, else every position."""
    return {"first": index.start, "stop": index.stop} if isinstance(index, range) else list(index)
