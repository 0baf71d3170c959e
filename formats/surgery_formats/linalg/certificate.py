# SPDX-License-Identifier: Apache-2.0
"""How far a Rayleigh-Ritz approximation can be from the Eckart-Young optimum, from numbers that block Krylov has at hand.

In the basis ``[U, rest]``, `U` being the `r` kept Ritz vectors, ``M M^T = [[T, C^T], [C, F]]`` with ``T = diag(theta^2)``. For any t > 0,
``2 x^T C^T y <= x^T C^T C x / t + t |y|^2``, hence ``M M^T <= diag(T + C^T C / t, (|F| + t) I)`` as quadratic forms, and the sum of its r
largest eigenvalues is at most ``sum_i max(eig_i(T + C^T C / t), |F| + t)``; the least over t is taken. ``C^T C`` costs nothing: what one
more block of Krylov adds outside the basis is ``C`` times the last rows of the Ritz vectors.

``|F|`` is bounded the same way from the Ritz values that were not kept and from the norm outside the whole basis. That norm is not known.
In the basis that Krylov would go on to build, what lies outside is block tridiagonal, and by Gershgorin no larger than ``|T_j| + |R_j| +
|R_j+1|`` of its largest row; the premise is that coefficients do not grow beyond the last ones seen. They shrink as directions converge,
and stay as they are in a dense bulk, of which ``|T| + 2 |R|`` is the edge.

Inside a dense bulk, such as rounding noise, no bound from norms alone can be close to one at a high rank. There the energy that is still to
come is extrapolated from what the last blocks brought, with a margin (`Convergence`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

__all__ = ["Convergence", "allowed_excess", "excess_energy", "outside_norm", "ratio_bound"]

_MARGIN = 2.0
"""What extrapolated energy is multiplied by."""
_POINTS = 24
"""Values of t that are tried, each twice the next."""
_FULL = 96
"""Largest ``C^T C`` whose eigenvalues are taken; above, rows are summed instead (Gershgorin), which is a little weaker and free."""


class Convergence:
    """Energy that the kept Ritz values hold, after each block, and how much more is to come."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, int, float]] = []

    def expected(self, kept: int, have: int, energy: float) -> float:
        """Record a basis; at least what larger ones can still add, infinite while nothing can be said.

        Gains per column fall geometrically or faster; the slowest rate of late is carried on for ever, and the result doubled.

        Args:
            kept: Ritz values kept; changes begin a new record.
            have: Columns of the basis.
            energy: Their sum.
        """
        self._seen = [*(seen for seen in self._seen[-3:] if seen[0] == kept), (kept, have, energy)]
        if len(self._seen) < 4:
            return math.inf
        gains = [
            ((later[2] - sooner[2]) / (later[1] - sooner[1]), (later[1] + sooner[1]) / 2)
            for sooner, later in pairwise(self._seen)
        ]
        if any(gain <= 0 for gain, _ in gains):
            return math.inf
        slowest = min(math.log(sooner[0] / later[0]) / (later[1] - sooner[1]) for sooner, later in pairwise(gains))
        gain, middle = gains[-1]
        return _MARGIN * gain * math.exp(slowest * (middle - have)) / slowest if slowest > 0 else math.inf


def outside_norm(small: torch.Tensor, beyond: torch.Tensor) -> float:
    """Estimate of ``|M M^T|`` outside the basis.

    Args:
        small: ``K^T M M^T K`` of the last two blocks (of the only one), float64.
        beyond: ``W^T W``, ``(b, b)``, float64, `W` being what the next product adds outside the basis.
    """
    b = len(beyond)
    last = float(torch.linalg.eigvalsh(small[-b:, -b:])[-1])
    before = float(torch.linalg.svdvals(small[-b:, :-b])[0]) if len(small) > b else 0.0
    return last + before + math.sqrt(max(float(torch.linalg.eigvalsh(beyond)[-1]), 0.0))


def excess_energy(ritz: torch.Tensor, coupling: torch.Tensor, kept: int, outside: float, enough: float) -> float:
    """Most by which ``sum_{i <= kept} sigma_i^2`` can exceed ``sum_{i <= kept} theta_i^2``.

    Args:
        ritz: ``theta^2`` of the whole basis, ``(d,)``, float64, descending, `d` > `kept`.
        coupling: ``C^T C`` of the whole basis, ``(d, d)``, float64.
        kept: Ritz vectors that are kept.
        outside: Norm of ``M M^T`` outside the basis, see `outside_norm`.
        enough: A bound this good is not improved, and where none can be as good none is looked for: the answer is infinite.
    """
    if kept == 0:
        return 0.0
    first = max(float(ritz[kept]), outside)
    if float((first - ritz[:kept]).clamp_min(0).sum()) > enough:
        return math.inf
    head, rest = _Form.of(ritz[:kept], coupling[:kept, :kept]), slice(kept, kept + _FULL)
    tail = _Form.of(ritz[rest], coupling[rest, rest])
    # Without eigenvalues: above t = theta_r - beyond the kept ones stay the largest, and their sum grows by the trace.
    gap = float(ritz[kept - 1]) - first - math.sqrt(tail.trace)
    if gap > 0 and (found := head.trace / gap) <= enough:
        return found
    beyond = _least(lambda t: max(tail.values(t)[0], first + t), _steps(tail.trace, first), first)
    base = float(ritz[:kept].sum())

    def excess(t: float) -> float:
        return math.fsum(max(value, beyond + t) for value in head.values(t)) - base

    return max(_least(excess, _steps(head.trace, float(ritz[0])), 0.0), 0.0)


@dataclass(frozen=True, slots=True)
class _Form:
    """``diag(T) + C / t`` for any `t`."""

    ritz: torch.Tensor
    diagonal: torch.Tensor
    coupling: torch.Tensor
    trace: float

    @classmethod
    def of(cls, ritz: torch.Tensor, coupling: torch.Tensor) -> _Form:
        return cls(ritz, torch.diag(ritz), coupling, max(float(coupling.diagonal().sum()), 0.0))

    def values(self, t: float) -> list[float]:
        """Its eigenvalues, or numbers whose every partial sum from above is no smaller; descending."""
        if len(self.ritz) > _FULL:
            found: list[float] = (self.ritz + self.coupling.abs().sum(1) / t).tolist()
            return sorted(found, reverse=True)
        made = torch.add(self.diagonal, self.coupling, alpha=1 / t)
        found = torch.linalg.eigvalsh(made).tolist()
        return found[::-1]


def _least(bound: Callable[[float], float], steps: list[float], otherwise: float) -> float:
    """The least of `bound` over `steps`, looked for where it is small: every fourth, then beside the least of these."""
    if not steps:
        return otherwise
    found = {at: bound(steps[at]) for at in range(0, len(steps), 4)}
    for stride in (2, 1):
        best = min(found, key=lambda at: found[at])
        found |= {at: bound(steps[at]) for at in (best - stride, best + stride) if 0 <= at < len(steps)}
    return min(found.values())


def ratio_bound(rest: float, excess: float) -> float:
    """``||M - approximation||_F`` over the optimum: `rest` is the squared error, `excess` what the optimum may hold beyond."""
    if rest <= 0:
        return 1.0
    return math.sqrt(rest / (rest - excess)) if excess < rest else math.inf


def allowed_excess(rest: float, ratio: float) -> float:
    """The excess at which `ratio_bound` is `ratio`."""
    return rest * (1 - 1 / ratio**2)


def _steps(size: float, largest: float) -> list[float]:
    """From where the coupling adds as much as it is, downwards; none where there is no coupling."""
    if size <= 0:
        return []
    top = min(math.sqrt(size), largest) if largest > 0 else math.sqrt(size)
    return [top * 2.0**-step for step in range(_POINTS)]
