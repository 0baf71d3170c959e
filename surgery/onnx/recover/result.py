# SPDX-License-Identifier: Apache-2.0
"""The result of writing a graph's weights as a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engine.ledger import Ledger
from surgery.reports.result import elapsed, summarised
from surgery_formats.text import numbered

if TYPE_CHECKING:
    from surgery.reports.summary import Summary
    from surgery.reports.values import Phrase, Piece

__all__ = ["RecoveryResult"]

_MEANINGS = {"moved": "of another name or layout in the graph"}
_FEW = 64  # whole numbers in a tensor that says a shape, an axis or an index


@summarised
@dataclass(frozen=True)
class RecoveryResult:
    """The weights of a graph as safetensors, written or (dry run) to be written.

    Attributes:
        output: The folder; None for a dry run.
        ledger: Every tensor.
        names: Whose names the tensors have: ``graph`` or ``base``.
        warnings: What the user should know.
        seconds: How long it took.
    """

    output: Path | None
    ledger: Ledger
    names: str
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()

    @property
    def nbytes(self) -> int:
        """Size of all weight files."""
        return self.ledger.plan.nbytes

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "output": None if self.output is None else str(self.output),
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "names": self.names,
            "tensors": len(self.ledger.plan.tensors),
            "warnings": list(self.warnings),
            "ledger": self.ledger.as_json(),
        }

    def summary(self, *, verbose: bool = False, output: Path | None = None) -> Summary:
        """What became of the graph's tensors.

        Args:
            verbose: Every tensor.
            output: Where a dry run would write.
        """
        from surgery.reports.output import DRY_RUN, PATH, counted, wrote
        from surgery.reports.sections import Column, Facts, Section, Table
        from surgery.reports.summary import Summary, warning_notes
        from surgery.reports.values import Name, Value

        plan = self.ledger.plan
        whose = "of the base, told by values" if self.names == "base" else "and layouts of the graph"
        facts: list[tuple[Phrase, Phrase]] = [
            ("graph", Name(plan.roots[0], PATH)),
            ("names", whose),
            ("tensors", counted(self.ledger.classes, _MEANINGS)),
            *self._dropped(),
        ]
        if self.output is None:
            size: tuple[Piece, ...] = (Value(plan.nbytes, "bytes"), " of weights")
            facts.append(("would write", size if output is None else (*size, " to ", Name(output, PATH))))
        else:
            facts.append(("wrote", (Name(self.output, PATH), ": ", *wrote(self.output, self.seconds))))
        sections: list[Section] = [Facts(tuple(facts))]
        if verbose:
            columns = Column("tensor", "name"), Column("class"), Column("shape", "shape"), Column("type")
            sections.append(Table(columns, tuple((t.label, t.outcome, t.shape, t.dtype.label) for t in plan.tensors)))
        if self.output is None:
            sections.append(DRY_RUN)
        return Summary("Conversion", (*sections, *warning_notes(self.warnings)))

    def _dropped(self) -> list[tuple[Phrase, Phrase]]:
        """What of the graph is no weight, by kinds."""
        dropped = [account.tensor for account in self.ledger.plan.accounts if account.outcome == "dropped"]
        sizes = ((tensor, math.prod(tensor.shape)) for tensor in dropped)
        numbers = sum(size == 1 or (size <= _FEW and not tensor.dtype.is_float) for tensor, size in sizes)
        kinds = []
        if numbers:
            kinds.append(f"{numbers} shapes, indices and scalars of the graph's nodes")
        if others := len(dropped) - numbers:
            kinds.append(
                f"{numbered(others, 'tensor')} that the exporter computed or added, such as tables of positions"
            )
        return [("dropped", "; ".join(kinds) + ": none is a weight of the base as it is")] if kinds else []
