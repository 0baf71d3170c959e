# SPDX-License-Identifier: Apache-2.0
"""What `surgery.combine` and `surgery.resize` return."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.reports.to_json import plain

__all__ = ["CombineResult", "Combined", "Source"]


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


@dataclass(frozen=True, slots=True)
class Combined:
    """One weight.

    Attributes:
        site: As the first adapter names it.
        outcome: ``exact``, ``approximated`` (directions dropped, or codes in the place of factors), ``kept`` (taken over as it was,
            perhaps with another scale) or ``left out`` (not chosen).
        ranks: Of the terms.
        rank: Of the result; 0 for what is not low-rank.
        norm: Frobenius norm of the delta that was wanted; None where it was not worked out.
        error: Relative Frobenius error of what was written, read back; for a dry run of what would be written, where it is known.
        optimum: Error of the best factors of this rank; None where it was not worked out.
    """

    site: str
    outcome: str
    ranks: tuple[int, ...]
    rank: int
    norm: float | None = None
    error: float | None = None
    optimum: float | None = None


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
    """

    output: Path | None
    verb: str
    sources: tuple[Source, ...]
    target: str
    method: str
    modules: tuple[Combined, ...]
    warnings: tuple[str, ...] = ()

    @property
    def error(self) -> float | None:
        """Relative Frobenius error over all weights together; None if none was worked out."""
        known = [(one.norm, one.error) for one in self.modules if one.norm is not None and one.error is not None]
        whole = math.hypot(*(norm for norm, _ in known))
        return math.hypot(*(norm * error for norm, error in known)) / whole if whole else None

    def as_json(self) -> dict[str, Any]:
        """For ``--json`` and the manifest; no paths."""
        found: dict[str, Any] = plain(replace(self, output=None))
        del found["output"]
        return {**found, "error": self.error}
