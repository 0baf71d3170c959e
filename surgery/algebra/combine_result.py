# SPDX-License-Identifier: Apache-2.0
"""The result of `surgery.combine` and `surgery.resize`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.reports.conflict import Conflict, conflict_charts
from surgery.reports.output import DRY_RUN, counted, destination, nbytes_of, written, wrote
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Column, Facts, Note, Section, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.to_json import plain, without_empty
from surgery.reports.values import Name, Phrase, Piece, Value

__all__ = ["CombineResult", "Combined", "Source"]

_LISTED = 20  # modules, those with the greatest errors, unless all are asked for


@dataclass(frozen=True, slots=True)
class Source:
    """One adapter that went in.

    Attributes:
        name: Of its file or folder.
        format: It was read as.
        weight: On its deltas.
    """

    name: str
    format: str
    weight: float


_MEANINGS = {
    "exact": "the very change that was asked for",
    "approximated": "off by the error below",
    "kept": "as they were, at most rescaled",
}


@dataclass(frozen=True, slots=True)
class Combined:
    """One weight.

    Attributes:
        site: As the first adapter names it.
        outcome: ``exact``, ``approximated`` (directions dropped, or codes in the place of factors), ``kept`` (taken
            over as it was, perhaps with another scale) or ``left out`` (not chosen).
        ranks: Of the terms.
        rank: Of the result; 0 for what is not low-rank.
        norm: Frobenius norm of the exact delta; None where it was not worked out.
        error: Relative Frobenius error of what was written, read back; for a dry run of what would be written, where it
            is known.
        optimum: Error of the best factors of this rank; None where it was not worked out.
    """

    site: str
    outcome: str
    ranks: tuple[int, ...]
    rank: int
    norm: float | None = None
    error: float | None = None
    optimum: float | None = None


@summarised
@dataclass(frozen=True)
class CombineResult:
    """What a combination did, or (dry run) would do.

    Attributes:
        output: File or folder; None for a dry run.
        verb: ``combine`` or ``resize``.
        sources: What went in.
        target: Format it was written in.
        method: How deltas were combined.
        modules: Every weight.
        warnings: What the user should know.
        conflicts: Of a dry run with two adapters: by weight, how they get in each other's way.
        seconds: How long it took.
    """

    output: Path | None
    verb: str
    sources: tuple[Source, ...]
    target: str
    method: str
    modules: tuple[Combined, ...]
    warnings: tuple[str, ...] = ()
    conflicts: Mapping[str, Conflict] = field(default_factory=dict)
    seconds: float = elapsed()

    @property
    def error(self) -> float | None:
        """Relative Frobenius error over all weights together; None if none was worked out."""
        known = [(m.norm, m.error) for m in self.modules if m.norm is not None and m.error is not None]
        whole = math.hypot(*(norm for norm, _ in known))
        return math.hypot(*(norm * error for norm, error in known)) / whole if whole else None

    @property
    def nbytes(self) -> int:
        """Size of all files written; 0 for a dry run."""
        return nbytes_of(self.output)

    def as_json(self) -> dict[str, Any]:
        """Plain values: the output, the time, and what the manifest has."""
        return written(self.output, self.seconds) | self.as_manifest()

    def as_manifest(self) -> dict[str, Any]:
        """The record in the manifest: the same for the same inputs and options, without paths and times."""
        facts: dict[str, Any] = without_empty(plain(replace(self, output=None)), ("conflicts",))
        del facts["output"]
        return {**facts, "error": self.error}

    def summary(self, *, verbose: bool = False, output: Path | None = None) -> Summary:
        """Sources, ranks and errors, and the modules that lost most; every module if `verbose`.

        Args:
            verbose: Every module.
            output: Where a dry run would write.
        """
        outcomes = Counter(module.outcome for module in self.modules)
        facts: list[tuple[str, Phrase]] = [
            (self.verb, self._terms()),
            ("to", destination(self.output or output, self.target)),
        ]
        if self.method != "exact":
            facts.append(("method", self.method))
        before, after = (sum(module.ranks) for module in self.modules), (module.rank for module in self.modules)
        facts += [("modules", counted(outcomes, _MEANINGS)), ("rank", f"{_spread(before)} -> {_spread(after)}")]
        if self.error is not None:
            expected = "" if self.output else " (expected)"
            facts.append(("error", (Value(self.error, "number", 3), f" of the whole delta's norm{expected}")))
        if self.output is not None:
            facts.append(("wrote", wrote(self.output, self.seconds)))
        sections: list[Section] = [Facts(tuple(facts))]
        lossy = (module for module in self.modules if module.outcome == "approximated" and module.error)
        worst = sorted(lossy, key=lambda module: -(module.error or 0.0))
        shown = self.modules if verbose else worst[:_LISTED]
        if shown:
            rows = (
                (
                    module.site,
                    module.outcome,
                    "+".join(str(rank or "none") for rank in module.ranks),
                    module.rank or None,
                    module.norm,
                    module.error,
                    module.optimum,
                )
                for module in shown
            )
            sections.append(Table(_COLUMNS, tuple(rows), "Modules"))
        hidden = outcomes["approximated"] - sum(module.outcome == "approximated" for module in shown)
        if hidden > 0:
            sections.append(Note(f"... and {hidden} more", "omitted"))
        sections += conflict_charts(self.conflicts)
        if self.output is None:
            sections.append(DRY_RUN)
        return Summary(self.verb.capitalize(), (*sections, *warning_notes(self.warnings)))

    def _terms(self) -> Phrase:
        pieces: list[Piece] = []
        for source in self.sources:
            weight = f" x {source.weight:g}" if source.weight != 1 else ""
            pieces += [" + "] * bool(pieces) + [Name(source.name), f" ({source.format}){weight}"]
        return tuple(pieces)


_COLUMNS = (
    Column("module", "name"), Column("outcome"), Column("ranks"), Column("rank", "integer"),
    Column("norm", "number", 3), Column("error", "number", 3), Column("best", "number", 3),
)  # fmt: skip


def _spread(ranks: Iterable[int]) -> str:
    """``8``, or ``4..16``; a rank of 0 is none."""
    known = sorted({rank for rank in ranks if rank})
    return "none" if not known else str(known[0]) if len(known) == 1 else f"{known[0]}..{known[-1]}"
