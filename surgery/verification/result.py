# SPDX-License-Identifier: Apache-2.0
"""What a verification found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from surgery.reports.drawings import Bars
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Chart, Column, Facts, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.values import Value

__all__ = ["Check", "LogitError", "Verification"]


@dataclass(frozen=True)
class Check:
    """Something that was found to be so.

    Attributes:
        name: What was looked at.
        detail: What was found.
        difference: Greatest difference of a logit, where there is one.
        limit: What it had to stay below.
    """

    name: str
    detail: str
    difference: float | None = None
    limit: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The result as plain values, for ``--json``."""
        numbers = {"difference": self.difference, "limit": self.limit} if self.limit is not None else {}
        return {"name": self.name, "detail": self.detail, **numbers}


@dataclass(frozen=True)
class LogitError:
    """Over all tokens of a text; of a classifier over its rows.

    Attributes:
        count: Number of rows of logits.
        error: In the norm of Frobenius, relative to the logits.
        agreement: Share of rows whose greatest logit is the same one.
        divergence: Mean Kullback-Leibler divergence of the graph's distribution from the model's, in nats.
    """

    count: int
    error: float
    agreement: float
    divergence: float

    @property
    def said(self) -> str:
        """For people."""
        return (
            f"error {self.error:.4f} of the model's, the greatest is the same for {self.agreement:.1%} of {self.count:,} "
            f"(KL divergence {self.divergence:.4f} nats)"
        )

    def as_json(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {name: value if name == "count" else float(f"{value:.6g}") for name, value in asdict(self).items()}


@summarised
@dataclass(frozen=True)
class Verification:
    """The checks that passed; one that fails raises an error instead.

    Attributes:
        path: The folder.
        kind: ``graph`` or ``folder``.
        checks: In order.
        notes: What could not be looked at, and how it can.
        digest: sha256 of the folder as OpenSSF model signing makes it, of all files; empty where not every file has one.
        seconds: How long it took.
        logits: How far a graph's logits are from the model's on a text, if one was given.
    """

    path: Path
    kind: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()
    digest: str = ""
    seconds: float = elapsed()
    logits: LogitError | None = None
    nbytes: ClassVar[int] = 0  # not counted for this verb

    @property
    def difference(self) -> float | None:
        """Greatest difference of a logit of all checks."""
        return max((check.difference for check in self.checks if check.difference is not None), default=None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes."""
        return self.notes

    def as_json(self) -> dict[str, Any]:
        """The result as plain values, for ``--json``."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "difference": self.difference,
            "checks": [check.as_json() for check in self.checks],
            "notes": list(self.notes),
            **({} if self.logits is None else {"logits": self.logits.as_json()}),
            **({"digest": {"sha256": self.digest}} if self.digest else {}),
        }

    def summary(self, *, verbose: bool = False) -> Summary:
        """Every check with what was found."""
        checks = Facts(tuple((check.name, check.detail) for check in self.checks))
        return Summary("Verification", (checks, *self._chart(), *warning_notes(self.notes)))

    def _chart(self) -> Iterator[Chart]:
        """Differences of logits beside what was allowed."""
        rows = tuple(
            (check.name, check.difference, check.limit, check.difference / check.limit)
            for check in self.checks
            if check.difference is not None and check.limit
        )
        if rows:
            columns = (
                Column("check"), Column("difference", "number", 3), Column("allowed", "number", 3),
                Column("of what is allowed", "share", 2),
            )  # fmt: skip
            says = "at most ", Value(max(row[3] for row in rows), "share"), " of what is allowed"
            yield Chart("Differences of logits", Table(columns, rows), Bars(0, (3,)), says)
