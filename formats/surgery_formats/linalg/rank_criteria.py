# SPDX-License-Identifier: Apache-2.0
"""How many directions to keep: of one matrix for a permitted loss, of many matrices under one budget."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["Allocation", "allocate", "checked_rank", "rank_holding"]

_ROUNDING = 4e-16
"""Share of the energy that float64 sums may miss."""


class Allocation(NamedTuple):
    """Ranks under a budget.

    Attributes:
        ranks: One rank per matrix.
        cost: Total cost, in the budget's unit.
        lost: ``sum sigma^2`` of the known directions that are not kept.
    """

    ranks: tuple[int, ...]
    cost: int
    lost: float


def checked_rank(rank: int, shape: Sequence[int]) -> tuple[int, str | None]:
    """Cap `rank` at what the matrix allows; the second value is a sentence if it was capped.

    Raises:
        ValueError: `rank` is not a positive integer.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank {rank!r} is not a positive integer")
    limit = min(shape)
    if rank <= limit:
        return rank, None
    return limit, f"rank {rank} cut to {limit}: a matrix of {' x '.join(map(str, shape))} has no more"


def rank_holding(squares: torch.Tensor, norm2: float, share: float) -> int | None:
    """Return the least rank whose tail holds at most `share` of the energy; None if the known values hold too little.

    `squares` are ``sigma^2``, ``(k,)``, descending, perhaps only the leading ones; `norm2` is ``||D||_F^2`` of the whole.
    """
    if norm2 <= 0:
        return 0
    known = squares.double()
    beyond = max(norm2 - float(known.sum()), 0.0)
    tails = known.flip(0).cumsum(0).flip(0) + beyond  # summed from the small end; tails[r] is the loss at rank r
    allowed = share * norm2 + _ROUNDING * len(known) * norm2
    if beyond > allowed:
        return None
    return int((tails > allowed).sum())


def allocate(
    spectra: Sequence[torch.Tensor],
    costs: Sequence[int],
    budget: int,
    *,
    least: int = 0,
    most: Sequence[int] | None = None,
) -> Allocation:
    """Choose ranks for many matrices under one budget: most energy per unit of cost first (water-filling).

    Greedy is optimal up to the last direction that does not fit, because each spectrum is descending.

    Args:
        spectra: Singular values of each matrix, descending.
        costs: Cost of one rank of each matrix: ``m + n`` parameters, or their bytes.
        budget: Total, in the same unit.
        least: Rank that every matrix gets, if it has that many directions.
        most: Upper limit for each matrix.

    Raises:
        ValueError: The budget does not even pay for `least`.
    """
    if len(spectra) != len(costs) or (most is not None and len(most) != len(costs)):
        raise ValueError("one spectrum, one cost and one limit per matrix")
    if any(cost <= 0 for cost in costs):
        raise ValueError("a rank must cost something")
    squares = [spectrum.double().square().tolist() for spectrum in spectra]
    limits = [min(len(s), len(s) if most is None else most[i]) for i, s in enumerate(squares)]
    ranks = [min(least, limit) for limit in limits]
    spent = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    if spent > budget:
        raise ValueError(f"rank {least} everywhere costs {spent}, more than the budget of {budget}")
    heap = [(-squares[i][ranks[i]] / costs[i], i) for i in range(len(costs)) if ranks[i] < limits[i]]
    heapq.heapify(heap)
    while heap:
        gain, i = heapq.heappop(heap)
        if gain == 0 or spent + costs[i] > budget:
            continue  # nothing to gain, or too expensive: a cheaper matrix may still fit
        ranks[i] += 1
        spent += costs[i]
        if ranks[i] < limits[i]:
            heapq.heappush(heap, (-squares[i][ranks[i]] / costs[i], i))
    lost = sum(sum(s[rank:]) for s, rank in zip(squares, ranks, strict=True))
    return Allocation(tuple(ranks), spent, lost)
