# SPDX-License-Identifier: Apache-2.0
"""The DoRA that comes nearest to a fine-tune: ``W' ~ diag(m / ||W + B A||) (W + B A)``, by alternation.

The row lengths of ``W + B A`` are free, for the magnitudes `m` replace them (Liu et al. 2024, arXiv:2402.09353). So with row scales `c` the
factors need only meet ``diag(c) W' - W``: for given factors ``c_i = <(W + B A)_i, W'_i> / ||W'_i||^2``, for given `c` the best factors are
a truncated SVD. From ``B A = 0`` this converges in a few steps; a rescaling of rows plus a change of the rank is recovered exactly. Factors
of the difference ``W' - W`` itself, which is where one would start from a LoRA, are a poor start: the rescaling hides in them.

All differences are formed before they are scaled, so that float32 loses nothing beside the larger weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from surgery_formats.errors import FitError
from surgery_formats.linalg.matrix import MatrixSource, one_thread
from surgery_formats.linalg.svd import truncated_svd

__all__ = ["Alternated", "Fitted", "HeldPair", "PairSource", "alternate", "best_columns", "best_rows", "row_share"]

_STEPS = 12
_SETTLED = 0.99
"""A step that leaves more than this share of what the one before left is the last."""
_EXACT = 1e-6
"""Relative residual below which nothing is left to gain in float32."""
_BLOCK = 1 << 21


class PairSource(Protocol):
    """A weight before and after tuning, which need not lie in memory."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        ...

    def rows(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows ``start:stop`` of W and W', each ``(stop - start, in)``, in float32 or float64; the same values each time."""
        ...


class HeldPair(NamedTuple):
    """One that does.

    Attributes:
        base: W, ``(out, in)``.
        tuned: W'.
    """

    base: torch.Tensor
    tuned: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return int(self.base.shape[0]), int(self.base.shape[1])

    def rows(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views."""
        return self.base[start:stop], self.tuned[start:stop]


class Alternated(NamedTuple):
    """``W' ~ diag(magnitude / ||W + B A||) (W + B A)``.

    Attributes:
        B: ``(out, r)``, the square root of every singular value in either factor.
        A: ``(r, in)``.
        magnitude: ``(out,)``, float64: of least squares, ``<W'_i, (W + B A)_i> / ||(W + B A)_i||``.
        gain: ``(out,)``, float64: what row i of ``W + B A`` is multiplied with.
        residual: ``||W' - diag(gain) (W + B A)||_F``.
        total: ``||W' - W||_F``.
        size: ``||W'||_F``.
        steps: Truncated SVDs that were made.
    """

    B: torch.Tensor
    A: torch.Tensor
    magnitude: torch.Tensor
    gain: torch.Tensor
    residual: float
    total: float
    size: float
    steps: int


class Fitted(NamedTuple):
    """Magnitudes for given factors.

    Attributes:
        magnitude: Float64; what gives each row (column) of ``W + B A`` its best length.
        gain: Float64; what it is multiplied with.
        residual: ``||W' - what comes out||_F``.
        scales: Of the next step; empty for columns.
    """

    magnitude: torch.Tensor
    gain: torch.Tensor
    residual: float
    scales: torch.Tensor


def alternate(pair: PairSource, rank: int, *, seed: int = 0, device: torch.device | str = "cpu") -> Alternated:
    """Find it.

    Args:
        pair: W and W'.
        rank: Of ``B A``; more than ``min(out, in)`` is cut.
        seed: Of the SVDs; same inputs and seed, same bits.
        device: Where the SVDs are made.

    Raises:
        FitError: A row of ``W + B A`` is zero, which has no direction.
    """
    with torch.no_grad(), one_thread():
        total, size = _norms(pair)
        scales = _aligned(pair)
        best, left, steps = None, math.inf, 0
        while steps < _STEPS:
            found = truncated_svd(_scaled(pair, scales, device), rank=rank, seed=seed, device=device)
            B, A = (factor.cpu() for factor in found.factors())
            steps += 1
            rows = best_rows(pair, B, A)
            if best is None or rows.residual < best[2].residual:
                best = B, A, rows
            settled = rows.residual > _SETTLED * left or rows.residual <= _EXACT * total
            left, scales = rows.residual, rows.scales
            if settled:
                break
        assert best is not None
        B, A, rows = best
        return Alternated(B, A, rows.magnitude, rows.gain, rows.residual, total, size, steps)


def best_rows(pair: PairSource, B: torch.Tensor, A: torch.Tensor) -> Fitted:
    """Magnitudes for given factors, by least squares, and the scales of the next step.

    Args:
        pair: W and W'.
        B: ``(out, r)``.
        A: ``(r, in)``.

    Raises:
        FitError: A row of ``W + B A`` is zero.
    """
    scales, magnitudes, gains, left = [], [], [], 0.0
    for start, stop in _blocks(pair):
        base, tuned = pair.rows(start, stop)
        change = B[start:stop].to(base.dtype) @ A.to(base.dtype)
        made = base + change
        both, own = _dots(made, tuned), _dots(made, made)
        if not bool((own > 0).all()):
            raise FitError("a row of the weight is zero: it has no direction that a magnitude could give a length")
        gain = both / own
        scales.append(_ratio(both, _dots(tuned, tuned)))
        magnitudes.append(gain * own.sqrt())
        gains.append(gain)
        # W' - g (W + BA) = (W' - W) + (1 - g) W - g BA: three small terms
        column = gain[:, None]
        rest = (tuned - base) + (1 - column).to(base.dtype) * base - column.to(base.dtype) * change
        left += float(rest.double().square().sum())
    return Fitted(torch.cat(magnitudes), torch.cat(gains), math.sqrt(left), torch.cat(scales))


def best_columns(pair: PairSource, B: torch.Tensor, A: torch.Tensor) -> Fitted:
    """The same for columns, which are what PEFT's magnitudes of an embedding belong to; two passes.

    Raises:
        FitError: A column of ``W + B A`` is zero.
    """
    both = torch.zeros(pair.shape[1], dtype=torch.float64)
    own = torch.zeros(pair.shape[1], dtype=torch.float64)
    for start, stop in _blocks(pair):
        base, tuned = pair.rows(start, stop)
        made = base + B[start:stop].to(base.dtype) @ A.to(base.dtype)
        both += (made * tuned).sum(dim=0, dtype=torch.float64)
        own += made.square().sum(dim=0, dtype=torch.float64)
    if not bool((own > 0).all()):
        raise FitError("a column of the weight is zero: it has no direction that a magnitude could give a length")
    gain, left = both / own, 0.0
    for start, stop in _blocks(pair):
        base, tuned = pair.rows(start, stop)
        change = B[start:stop].to(base.dtype) @ A.to(base.dtype)
        rest = (tuned - base) + (1 - gain).to(base.dtype) * base - gain.to(base.dtype) * change
        left += float(rest.double().square().sum())
    return Fitted(gain * own.sqrt(), gain, math.sqrt(left), gain.new_zeros(0))


def row_share(rest: torch.Tensor, made: torch.Tensor) -> tuple[float, float]:
    """How much of what a LoRA leaves is a rescaling of rows: the test whether alternation can win.

    Args:
        rest: Some rows of ``W' - W - B A``, ``(rows, in)``.
        made: The same of ``W + B A``.

    Returns:
        ``(energy along W + B A, energy)``: the first is what scales alone would take away, less what chance aligns.
    """
    along = _ratio(_dots(rest, made).square(), _dots(made, made), nothing=0.0)
    energy = float(_dots(rest, rest).sum())
    return float(along.sum()) - energy / max(rest.shape[1], 1), energy


@dataclass(frozen=True)
class _Scaled:
    """``diag(c) W' - W``; satisfies `surgery_formats.linalg.matrix.MatrixSource`."""

    pair: PairSource
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.pair.shape

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """As differences of what is almost equal."""
        base, tuned = self.pair.rows(start, stop)
        return (tuned - base) + (self.scales[start:stop, None] - 1).to(base.dtype) * tuned


def _scaled(pair: PairSource, scales: torch.Tensor, device: torch.device | str) -> torch.Tensor | MatrixSource:
    source = _Scaled(pair, scales)
    return source.rows(0, pair.shape[0]).to(device) if isinstance(pair, HeldPair) else source


def _aligned(pair: PairSource) -> torch.Tensor:
    """Scales for no factors at all."""
    found = []
    for start, stop in _blocks(pair):
        base, tuned = pair.rows(start, stop)
        found.append(_ratio(_dots(base, tuned), _dots(tuned, tuned)))
    return torch.cat(found)


def _norms(pair: PairSource) -> tuple[float, float]:
    total = size = 0.0
    for start, stop in _blocks(pair):
        base, tuned = pair.rows(start, stop)
        total += float((tuned - base).double().square().sum())
        size += float(tuned.double().square().sum())
    return math.sqrt(total), math.sqrt(size)


def _blocks(pair: PairSource) -> list[tuple[int, int]]:
    rows, cols = pair.shape
    step = max(1, _BLOCK // max(cols, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _dots(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Row by row, summed in float64."""
    return (one * other).sum(dim=1, dtype=torch.float64)


def _ratio(over: torch.Tensor, under: torch.Tensor, nothing: float = 1.0) -> torch.Tensor:
    return torch.where(under > 0, over / under.clamp_min(torch.finfo(torch.float64).tiny), nothing)
