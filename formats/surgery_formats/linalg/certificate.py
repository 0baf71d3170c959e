# SPDX-License-Identifier: Apache-2.0
"""How far a Rayleigh-Ritz approximation can be from the Eckart-Young optimum, from numbers that Krylov has anyway.

In the basis ``[U, rest]``, `U` being the `r` kept Ritz vectors, ``M M^T = [[T, C^T], [C, F]]`` with
``T = diag(theta^2)``. For any t > 0, ``2 x^T C^T y <= x^T C^T C x / t + t |y|^2``, hence
``M M^T <= diag(T + C^T C / t, (|F| + t) I)`` as quadratic forms, and the sum of its r largest eigenvalues is at most
``sum_i max(eig_i(T + C^T C / t), |F| + t)``; the bound is the least over t. ``C^T C`` costs nothing: what one more
Krylov block adds outside the basis is ``C`` times the last rows of the Ritz vectors.

``|F|`` is bounded in the same way from the remaining Ritz values and from the norm outside the whole basis. That norm
is unknown. In the basis that Krylov would build next, the outside is block tridiagonal, and by Gershgorin no larger
than ``|T_j| + |R_j| + |R_j+1|`` of its largest row; the premise is that coefficients do not grow beyond the last ones
seen. They shrink as directions converge, and stay constant in a dense bulk, whose edge is ``|T| + 2 |R|``.

Inside a dense bulk, such as rounding noise, no bound from norms alone can be close to one at a high rank. There the
energy still to come is extrapolated from the gains of the last blocks, with a margin (`Convergence`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy

__all__ = ["Convergence", "allowed_excess", "excess_energy", "outside_norm", "ratio_bound"]

_MARGIN = 2.0
"""Factor on the extrapolated energy."""
_POINTS = 24
"""Number of values of t to try, each half the one before."""
_FULL = 96
"""Largest ``C^T C`` to diagonalise; above, Gershgorin row sums are used: a little weaker, but free."""


class Convergence:
    """The energy in the kept Ritz values after each block, and an estimate of what is still to come."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, int, float]] = []

    def expected(self, kept: int, columns: int, energy: float) -> float:
        """Record a basis and bound from above what larger ones can still add; infinite if unknown.

        Gains per column fall geometrically or faster; the slowest recent rate is extrapolated and the result doubled.
        `energy` is the sum of the `kept` Ritz values of a basis of `columns`; another number of them starts a new record.
        """
        self._seen = [*(seen for seen in self._seen[-3:] if seen[0] == kept), (kept, columns, energy)]
        if len(self._seen) < 4:
            return math.inf
        gains = [
            ((later[2] - earlier[2]) / (later[1] - earlier[1]), (later[1] + earlier[1]) / 2)
            for earlier, later in pairwise(self._seen)
        ]
        if any(gain <= 0 for gain, _ in gains):
            return math.inf
        slowest = min(math.log(earlier[0] / later[0]) / (later[1] - earlier[1]) for earlier, later in pairwise(gains))
        gain, middle = gains[-1]
        return _MARGIN * gain * math.exp(slowest * (middle - columns)) / slowest if slowest > 0 else math.inf


def outside_norm(small: numpy.ndarray, beyond: numpy.ndarray) -> numpy.ndarray:
    """Estimate ``|M M^T|`` outside the basis; of one matrix, or of stacks of them.

    `small` is ``K^T M M^T K`` of the last two blocks (or the only one), `beyond` ``W^T W``, ``(..., b, b)``, where `W` is
    what the next product adds outside the basis; both float64.
    """
    b = beyond.shape[-1]
    norm: numpy.ndarray = numpy.linalg.eigvalsh(small[..., -b:, -b:])[..., -1]
    if small.shape[-1] > b:
        norm = norm + numpy.linalg.svdvals(small[..., -b:, :-b])[..., 0]
    norm += numpy.sqrt(numpy.linalg.eigvalsh(beyond)[..., -1].clip(min=0))
    return norm


def excess_energy(ritz: numpy.ndarray, coupling: numpy.ndarray, kept: int, outside: float, enough: float) -> float:
    """Bound ``sum_{i <= kept} sigma_i^2 - sum_{i <= kept} theta_i^2`` from above.

    `ritz` is ``theta^2`` of the whole basis, ``(d,)``, descending, `d` > `kept`; `coupling` its ``C^T C``, ``(d, d)``; both
    float64. `outside` is the norm of ``M M^T`` outside the basis (`outside_norm`). A bound below `enough` is not improved
    further; if it is out of reach, the result is infinite.
    """
    if kept == 0:
        return 0.0
    first = max(float(ritz[kept]), outside)
    if float((first - ritz[:kept]).clip(min=0).sum()) > enough:
        return math.inf
    head, rest = _Form.of(ritz[:kept], coupling[:kept, :kept]), slice(kept, kept + _FULL)
    tail = _Form.of(ritz[rest], coupling[rest, rest])
    # Without eigenvalues: above t = theta_r - beyond the kept values stay the largest; their sum grows by the trace.
    gap = float(ritz[kept - 1]) - first - math.sqrt(tail.trace)
    if gap > 0 and (simple := head.trace / gap) <= enough:
        return simple
    beyond = _least(lambda t: max(tail.values(t)[0], first + t), _steps(tail.trace, first), first)
    base = float(ritz[:kept].sum())

    def excess(t: float) -> float:
        return math.fsum(max(value, beyond + t) for value in head.values(t)) - base

    return max(_least(excess, _steps(head.trace, float(ritz[0])), 0.0), 0.0)


@dataclass(frozen=True, slots=True)
class _Form:
    """``diag(T) + C / t`` for any `t`."""

    ritz: numpy.ndarray
    diagonal: numpy.ndarray
    coupling: numpy.ndarray
    trace: float

    @classmethod
    def of(cls, ritz: numpy.ndarray, coupling: numpy.ndarray) -> _Form:
        return cls(ritz, numpy.diag(ritz), coupling, max(float(coupling.diagonal().sum()), 0.0))

    def values(self, t: float) -> list[float]:
        """Return the eigenvalues, or upper bounds of all their leading partial sums; descending."""
        if len(self.ritz) > _FULL:
            values: list[float] = (self.ritz + numpy.abs(self.coupling).sum(axis=1) / t).tolist()
            return sorted(values, reverse=True)
        values = numpy.linalg.eigvalsh(self.diagonal + self.coupling / t).tolist()
        return values[::-1]


def _least(bound: Callable[[float], float], steps: list[float], otherwise: float) -> float:
    """Minimise `bound` over `steps`: try every fourth, then refine around the best."""
    if not steps:
        return otherwise
    values = {step: bound(steps[step]) for step in range(0, len(steps), 4)}
    for stride in (2, 1):
        best = min(values, key=lambda step: values[step])
        values |= {step: bound(steps[step]) for step in (best - stride, best + stride) if 0 <= step < len(steps)}
    return min(values.values())


def ratio_bound(rest: float, excess: float) -> float:
    """``||M - approximation||_F`` over the optimum, from the squared error `rest` and the bound `excess`."""
    if rest <= 0:
        return 1.0
    return math.sqrt(rest / (rest - excess)) if excess < rest else math.inf


def allowed_excess(rest: float, ratio: float) -> float:
    """Return the excess at which `ratio_bound` is `ratio`."""
    return rest * (1 - 1 / ratio**2)


def _steps(size: float, largest: float) -> list[float]:
    """Return values of t, descending from where the coupling contributes its own size; empty without coupling."""
    if size <= 0:
        return []
    top = min(math.sqrt(size), largest) if largest > 0 else math.sqrt(size)
    return [top * 2.0**-step for step in range(_POINTS)]
