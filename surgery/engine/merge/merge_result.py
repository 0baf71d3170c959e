# SPDX-License-Identifier: Apache-2.0
"""The result of `surgery.merge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engine.ledger import Ledger
from surgery.reports.result import elapsed, summarised

if TYPE_CHECKING:
    from surgery.engine.preview import Preview
    from surgery.engine.quantised.residual import ResidualLoRA
    from surgery.reports.summary import Summary

__all__ = ["MergeResult"]


@summarised
@dataclass(frozen=True)
class MergeResult:
    """What a merge did, or (dry run) would do.

    Attributes:
        output: The folder; None for a dry run.
        ledger: Every tensor, with what was measured.
        warnings: What the user should know.
        preview: Of a dry run, what writing would take.
        rounding_nbytes: Size of the file that a reversible merge keeps beside the model; 0 without one.
        residual: The LoRA beside a model that keeps its codes.
        seconds: How long it took.
    """

    output: Path | None
    ledger: Ledger
    warnings: tuple[str, ...]
    preview: Preview | None = None
    rounding_nbytes: int = 0
    residual: ResidualLoRA | None = None
    seconds: float = elapsed()

    @property
    def nbytes(self) -> int:
        """Size of all weight files; of a dry run, the size they would have."""
        return self.ledger.plan.nbytes

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        plan = self.ledger.plan
        return {
            "output": None if self.output is None else str(self.output),
            "nbytes": plan.nbytes,
            "seconds": round(self.seconds, 3),
            "files": {file.name: file.nbytes for file in plan.files},
            **({"rounding_nbytes": self.rounding_nbytes} if self.rounding_nbytes else {}),
            **({"residual": self.residual.as_json()} if self.residual else {}),
            "warnings": list(self.warnings),
            "ledger": self.ledger.as_json(),
        }

    def summary(self, *, verbose: bool = False) -> Summary:
        """What was merged, what became of the tensors, and how much of the update survives.

        With `verbose` also every tensor or operation.
        """
        from surgery.engine.merge.merge_summary import merge_summary

        return merge_summary(
            self.ledger,
            self.output,
            self.preview,
            self.seconds,
            self.warnings,
            verbose,
            rounding_nbytes=self.rounding_nbytes,
            residual=self.residual,
        )
