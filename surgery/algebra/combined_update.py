# SPDX-License-Identifier: Apache-2.0
"""What several adapters do to one weight, as updates whose factors are solved for when they are written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from surgery.algebra.sums import DeltaTarget, Solved
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Site
from surgery_formats.linalg.solutions import RecentSolutions
from surgery_formats.updates import Update

__all__ = ["CombinedUpdate", "Outcome", "Solutions", "new_solutions"]

Outcome = Literal["exact", "approximated", "kept"]

Solutions = RecentSolutions[Solved]


def new_solutions(*, while_planning: bool = False) -> Solutions:
    """The memory of one combination; where the plan itself has to solve for factors, they are kept until they are written."""
    return RecentSolutions(_nbytes, groups=None) if while_planning else RecentSolutions(_nbytes)


def _nbytes(solved: Solved) -> int:
    return int(solved.B.nbytes + solved.A.nbytes)


@dataclass(frozen=True)
class CombinedUpdate:
    """The combination of one weight.

    Attributes:
        site: As the first adapter that touches it spells it.
        updates: The result, for a writer.
        outcome: Nothing lost, directions dropped, or taken over as it was.
        ranks: Of the low-rank terms that went in.
        rank: Of the result; 0 if it is not low-rank.
        targets: The deltas that the result stands for: one per expert, one otherwise; empty if it is not low-rank.
        vector: A bias's delta, where there is one.
        best: ``(norm, residual)`` of the optimum of this rank, added in squares over `targets`; None if it was not
            worked out.
        solved_as: Keys of its factors in the memory of solutions.
    """

    site: Site
    updates: tuple[Update, ...]
    outcome: Outcome
    ranks: tuple[int, ...] = ()
    rank: int = 0
    targets: tuple[DeltaTarget, ...] = ()
    vector: Callable[[], Array] | None = None
    best: tuple[float, float] | None = None
    solved_as: tuple[str, ...] = ()

    def lost(self, solutions: Solutions) -> float:
        """Frobenius norm of what the factors leave out, all experts together."""
        return math.hypot(*(solutions.errors[key] for key in self.solved_as if key in solutions.errors))
