# SPDX-License-Identifier: Apache-2.0
"""The result of `surgery.convert`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.reports.output import DRY_RUN, PATH, counted, destination, nbytes_of, written, wrote
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Column, Facts, Note, Section, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.values import Cell, Name, Phrase, Value
from surgery_formats.adapters.format import Entry
from surgery_formats.text import numbered

__all__ = ["ConvertResult"]

_LISTED = 20  # lost parts named, unless all are asked for


_MEANINGS = {
    "folded": "the same change, a scale multiplied in",
    "rounded": "to a type of fewer digits",
    "approximated": "as near as the format allows",
    "dropped": "left out",
}


@summarised
@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did, or (dry run) would do.

    Attributes:
        output: File or folder; None for a dry run.
        source: Format it was read from.
        target: Format it was written in.
        entries: What became of every update.
        errors: Per weight that is not approximated, the greatest error found by the proof relative to the greatest
            value; empty for a dry run.
        warnings: What the user should know.
        adapter: What was converted.
        as_lora: Whether updates of other kinds became LoRAs.
        consumer: The program that it was written for, or empty.
        following: How to load it, once it is written; empty where no one call does.
        seconds: How long it took.
    """

    output: Path | None
    source: str
    target: str
    entries: tuple[Entry, ...]
    errors: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    adapter: Path | None = None
    as_lora: bool = False
    consumer: str = ""
    following: tuple[str | Name, ...] = ()
    seconds: float = elapsed()

    @property
    def max_error(self) -> float:
        """The worst weight's error; what is approximated not counted."""
        return max(self.errors.values(), default=0.0)

    @property
    def max_approximation(self) -> float:
        """The worst error of what is approximated, relative to the norm of its change."""
        return max((entry.error for entry in self.entries if entry.error is not None), default=0.0)

    @property
    def nbytes(self) -> int:
        """Size of all files written; 0 for a dry run."""
        return nbytes_of(self.output)

    def as_json(self) -> dict[str, Any]:
        """Plain values: the output, the time, and what the manifest has."""
        return written(self.output, self.seconds) | self.as_manifest()

    def as_manifest(self) -> dict[str, Any]:
        """The record in the manifest: the same for the same inputs and options, without paths and times."""
        return {
            "verb": "convert",
            "from": self.source,
            "to": self.target,
            **({"as": "lora"} if self.as_lora else {}),
            **({"for": self.consumer} if self.consumer else {}),
            "entries": [
                {"site": e.site, "outcome": e.outcome, "detail": e.detail}
                | ({} if e.error is None else {"error": e.error})
                for e in self.entries
            ],
            "errors": dict(self.errors),
            "max_error": self.max_error,
            "max_approximation": self.max_approximation,
            "warnings": list(self.warnings),
        }

    def summary(self, *, verbose: bool = False, output: Path | None = None) -> Summary:
        """The formats, the proof, and the parts that were dropped; every part if `verbose`.

        Args:
            verbose: Every part.
            output: Where a dry run would write.
        """
        outcomes: Counter[str] = Counter(entry.outcome for entry in self.entries)
        source: Phrase = Name(self.source)
        if self.adapter is not None:
            source = Name(self.adapter, PATH), " (", Name(self.source), ")"
        facts: list[tuple[str, Phrase]] = [
            ("convert", source),
            ("to", destination(self.output or output, self.target)),
            *([("for", self.consumer)] if self.consumer else []),
            ("parts", counted(outcomes, _MEANINGS)),
        ]
        if self.output is not None:
            facts += [("proof", self._proof(outcomes["approximated"])), ("wrote", wrote(self.output, self.seconds))]
        dropped = [entry for entry in self.entries if entry.outcome == "dropped"]
        worst = sorted((e for e in self.entries if self.as_lora and e.error), key=lambda e: -(e.error or 0.0))
        shown = list(self.entries) if verbose else [*dropped[:_LISTED], *worst[:_LISTED]]
        sections: list[Section] = [Facts(tuple(facts))]
        if shown:
            sections.append(
                Table((Column("part", "name"), Column("outcome"), Column("detail")), tuple(map(_part, shown)))
            )
        for what, left in (("dropped", len(dropped)), ("approximated", len(worst))):
            if left > _LISTED and not verbose:
                sections.append(Note(f"... and {left - _LISTED} more {what}", "omitted"))
        if self.output is None:
            sections.append(DRY_RUN)
        elif self.following:
            sections.append(Note(("next: ", *self.following)))
        return Summary("Conversion", (*sections, *warning_notes(self.warnings)))

    def _proof(self, approximated: int) -> str:
        many = len(self.errors) != 1
        written = "are written as computed" if many else "is written as computed"
        what = written if self.as_lora and approximated else "change as before" if many else "changes as before"
        same = f"{numbered(len(self.errors), 'weight')} {what}; largest error {self.max_error:.1e} of a change"
        near = f"{approximated} change nearly as before; largest error {self.max_approximation:.2%} of a change"
        return "; ".join([same] * bool(self.errors) + [near] * bool(approximated)) or same


def _part(entry: Entry) -> tuple[Cell, ...]:
    detail: Phrase = entry.detail
    if entry.error is not None:
        detail = entry.detail, ", error ", Value(entry.error, "share")
    return entry.site, entry.outcome, detail
