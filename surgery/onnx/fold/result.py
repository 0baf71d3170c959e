# SPDX-License-Identifier: Apache-2.0
"""The result of `surgery.fold`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.reports.output import DRY_RUN, PATH
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Facts, Note
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.values import Name, Phrase, Value
from surgery_formats.text import show

__all__ = ["FoldResult"]


@summarised
@dataclass(frozen=True)
class FoldResult:
    """What became of a graph whose branches were folded.

    Attributes:
        output: The folder; None for a dry run.
        graph: The graph it was made of.
        folded: The tensors that changed, each with the node that reads it and the rank of what was added.
        removed: Nodes that are gone.
        nbytes: Bytes written.
        warnings: What the user should know.
        seconds: How long it took.
    """

    output: Path | None
    graph: Path
    folded: tuple[tuple[str, str, int], ...]
    removed: int
    nbytes: int = 0
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "output": None if self.output is None else str(self.output),
            "graph": str(self.graph),
            "folded": [{"tensor": tensor, "node": node, "rank": rank} for tensor, node, rank in self.folded],
            "removed": self.removed,
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }

    def summary(self, *, verbose: bool = False, output: Path | None = None) -> Summary:
        """How many branches went into weights; with `verbose` which.

        Args:
            verbose: Name every tensor.
            output: Where a dry run would write.
        """
        where = self.output or output
        empty = sum(1 for _, _, rank in self.folded if not rank)
        unchanged = f", {empty} of them empty" if empty else ""
        facts: list[tuple[str, Phrase]] = [
            ("graph", Name(self.graph, PATH)),
            ("folded", f"{len(self.folded)} branches{unchanged}, {self.removed} nodes less"),
        ]
        if where is not None:
            size = Value(self.nbytes, "bytes")
            facts.append(
                ("wrote", (Name(where, PATH), ": ", size)) if self.output else ("would write", Name(where, PATH))
            )
        notes = [Note(f"{show(tensor)}: rank {rank}") for tensor, _, rank in self.folded] if verbose else []
        notes += [DRY_RUN] if self.output is None else []
        return Summary("Fold", (Facts(tuple(facts)), *notes, *warning_notes(self.warnings)))
