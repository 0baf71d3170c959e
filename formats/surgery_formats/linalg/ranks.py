# SPDX-License-Identifier: Apache-2.0
"""How many directions to keep: of one matrix by what may be lost, of many by what they may cost together."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["Allocation", "allocate", "auto_rank", "checked_rank", "rank_for_energy", "rank_for_error", "rank_holding"]

_ROUNDING = 4e-16
"""Share of the energy that sums in float64 may lack."""


class Allocation(NamedTuple):
    """Ranks under a budget.

    Attributes:
        ranks: One per matrix.
        cost: What they cost together, in the budget's unit.
        lost: ``sum sigma^2`` of the directions known and not kept.
    """

    ranks: tuple[int, ...]
    cost: int
    lost: float


def checked_rank(rank: int, shape: Sequence[int]) -> tuple[int, str | None]:
    """`rank`, cut to what a matrix can have, and a sentence if it was.

    Raises:
        ValueError: Not a positive integer.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank {rank!r} is not a positive integer")
    limit = min(shape)
    if rank <= limit:
        return rank, None
    return limit, f"rank {rank} cut to {limit}: a matrix of {' x '.join(map(str, shape))} has no more"


def rank_holding(squares: torch.Tensor, norm2: float, share: float) -> int | None:
    """The least rank whose tail is at most `share` of the energy.

    Args:
        squares: ``sigma^2``, ``(k,)``, descending; may be only the first ones.
        norm2: ``||D||_F^2``, of all.
        share: Energy that may be lost.

    Returns:
        None where the values given hold too little.
    """
    if norm2 <= 0:
        return 0
    known = squares.double()
    beyond = max(norm2 - float(known.sum()), 0.0)
    tails = known.flip(0).cumsum(0).flip(0) + beyond  # small ones first; tails[r] is what rank r loses
    allowed = share * norm2 + _ROUNDING * len(known) * norm2
    if beyond > allowed:
        return None
    return int((tails > allowed).sum())


def rank_for_energy(values: torch.Tensor, energy: float, total: float | None = None) -> int | None:
    """The least rank that holds a share `energy` of ``||D||_F^2``.

    Args:
        values: Singular values, ``(k,)``, descending.
        energy: In (0, 1].
        total: ``||D||_F``; that of `values` by default.
    """
    squares = values.double().square()
    return rank_holding(squares, float(squares.sum()) if total is None else total**2, 1 - energy)


def rank_for_error(values: torch.Tensor, max_error: float, total: float | None = None) -> int | None:
    """The least rank with ``||D - D_r||_F <= max_error ||D||_F``; arguments as in `rank_for_energy`."""
    squares = values.double().square()
    return rank_holding(squares, float(squares.sum()) if total is None else total**2, max_error**2)


def allocate(
    spectra: Sequence[torch.Tensor],
    costs: Sequence[int],
    budget: int,
    *,
    least: int = 0,
    most: Sequence[int] | None = None,
) -> Allocation:
    """Ranks of many matrices under one budget: the direction with most energy per unit of cost first (water-filling).

    Greedy is optimal up to the last direction that does not fit, since each matrix's directions are taken in descending order.

    Args:
        spectra: Per matrix, singular values, descending.
        costs: Per matrix, what one rank costs: ``m + n`` parameters, or that times the bytes of one.
        budget: In the same unit.
        least: Every matrix gets so many where it has them, whatever its energy.
        most: Per matrix, an upper limit.

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
            continue  # nothing to gain, or too dear: a cheaper matrix may still fit
        ranks[i] += 1
        spent += costs[i]
        if ranks[i] < limits[i]:
            heapq.heappush(heap, (-squares[i][ranks[i]] / costs[i], i))
    lost = sum(sum(s[rank:]) for s, rank in zip(squares, ranks, strict=True))
    return Allocation(tuple(ranks), spent, lost)


def auto_rank(values: torch.Tensor, edge: float, budget: int | None = None) -> int:
    """Directions that stand out of rounding noise, at most `budget`.

    Args:
        values: Singular values, descending.
        edge: Largest singular value that noise alone would have (`surgery_formats.linalg.noise`).
        budget: What a budget allows for this matrix.
    """
    signal = int((values > edge).sum())
    return signal if budget is None else min(signal, budget)
