# SPDX-License-Identifier: Apache-2.0
"""The DoRA nearest to a fine-tune: ``W' ~ diag(m / ||W + B A||) (W + B A)``, by alternating least squares and SVD.

The row lengths of ``W + B A`` are free, because the magnitudes `m` replace them (Liu et al. 2024, arXiv:2402.09353). So
with row scales `c` the factors only have to approximate ``diag(c) W' - W``: for fixed factors
``c_i = <(W + B A)_i, W'_i> / ||W'_i||^2``, for fixed `c` the best factors are a truncated SVD. From ``B A = 0`` this
converges in a few steps and recovers a row scaling plus a change of that rank exactly. The factors of ``W' - W``, the
obvious start for a LoRA, are a poor start here: they mix in the rescaling.

All differences are formed before they are scaled, so that float32 loses nothing beside the larger weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy

from surgery_formats.arrays import Array, cast, dtype_of, is_torch, namespace, to_cpu, to_device
from surgery_formats.errors import FitError
from surgery_formats.linalg.matrix import MatrixSource
from surgery_formats.linalg.svd import truncated_svd
from surgery_formats.threads import one_thread

__all__ = ["DoRAFit", "HeldPair", "Magnitudes", "PairSource", "alternate", "best_columns", "best_rows", "row_share"]

_STEPS = 12
_SETTLED = 0.99
"""Stop after a step that leaves more than this share of the previous residual."""
_EXACT = 1e-6
"""Relative residual below which float32 cannot improve further."""
_BLOCK = 1 << 21
"""Elements read at a time."""
_CACHED = 1 << 16
"""Elements of a block that is passed over several times on the CPU."""
_TINY = float(numpy.finfo(numpy.float64).tiny)


class PairSource(Protocol):
    """A weight before and after tuning, not necessarily in memory."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        ...

    def rows(self, start: int, stop: int) -> tuple[Array, Array]:
        """Rows ``start:stop`` of W and W', each ``(stop - start, in)``, float32 or float64; repeatable."""
        ...


class HeldPair(NamedTuple):
    """W and W' in memory, both ``(out, in)``."""

    base: Array
    tuned: Array

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return int(self.base.shape[0]), int(self.base.shape[1])

    def rows(self, start: int, stop: int) -> tuple[Array, Array]:
        """Views of rows ``start:stop`` of W and W'."""
        return self.base[start:stop], self.tuned[start:stop]


class DoRAFit(NamedTuple):
    """``W' ~ diag(magnitude / ||W + B A||) (W + B A)``.

    Attributes:
        B: ``(out, r)``; each factor holds the square root of every singular value.
        A: ``(r, in)``.
        magnitude: ``(out,)``, float64, by least squares: ``<W'_i, (W + B A)_i> / ||(W + B A)_i||``.
        gain: ``(out,)``, float64: the factor on row i of ``W + B A``.
        residual: ``||W' - diag(gain) (W + B A)||_F``.
        total: ``||W' - W||_F``.
        size: ``||W'||_F``.
        steps: Number of truncated SVDs.
    """

    B: Array
    A: Array
    magnitude: Array
    gain: Array
    residual: float
    total: float
    size: float
    steps: int


class Magnitudes(NamedTuple):
    """Magnitudes fitted to fixed factors.

    Attributes:
        magnitude: Float64; gives each row (column) of ``W + B A`` its best length.
        gain: Float64; the factor on each row (column).
        residual: ``||W' - result||_F``.
        scales: Row scales for the next step; empty for columns.
    """

    magnitude: Array
    gain: Array
    residual: float
    scales: Array


def alternate(pair: PairSource, rank: int, *, seed: int = 0, device: str | None = None) -> DoRAFit:
    """Fit a DoRA of rank `rank` to `pair`.

    Args:
        pair: W and W'.
        rank: Rank of ``B A``, capped at ``min(out, in)``.
        seed: Seed of the SVDs; equal inputs and seeds give equal bits.
        device: Where to compute the SVDs of a pair on the CPU; where the pair is by default.

    Raises:
        FitError: a row of ``W + B A`` is zero and has no direction.
    """
    with one_thread():
        total, size = _norms(pair)
        scales = _aligned(pair)
        best, left, steps = None, math.inf, 0
        while steps < _STEPS:
            svd = truncated_svd(_scaled(pair, scales, device), rank=rank, seed=seed, device=device)
            B, A = (factor if device is None else to_cpu(factor) for factor in svd.factors())
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
        return DoRAFit(B, A, rows.magnitude, rows.gain, rows.residual, total, size, steps)


def best_rows(pair: PairSource, B: Array, A: Array) -> Magnitudes:
    """Fit magnitudes to fixed factors ``B (out, r)`` and ``A (r, in)`` by least squares, and the next step's scales.

    Raises:
        FitError: a row of ``W + B A`` is zero.
    """
    scales, magnitudes, gains, error = [], [], [], 0.0
    xp = namespace(B, A)
    for at, base, tuned in _blocks(pair):
        change = _product(B[at], A, base)
        adapted = base + change
        inner, squares = _dots(adapted, tuned), _dots(adapted, adapted)
        if not bool(xp.all(squares > 0)):
            raise FitError("a row of the weight is zero, so it has no direction for a magnitude to scale")
        gain = inner / squares
        scales.append(_ratio(inner, _dots(tuned, tuned)))
        magnitudes.append(gain * xp.sqrt(squares))
        gains.append(gain)
        error += _missed(base, tuned, change, gain[:, None])
    return Magnitudes(xp.concat(magnitudes), xp.concat(gains), math.sqrt(error), xp.concat(scales))


def best_columns(pair: PairSource, B: Array, A: Array) -> Magnitudes:
    """Like `best_rows`, per column, as PEFT stores the magnitudes of an embedding; two passes.

    Raises:
        FitError: a column of ``W + B A`` is zero.
    """
    xp = namespace(B, A)
    inner = xp.zeros(pair.shape[1], dtype=xp.float64, device=A.device)
    squares = xp.zeros(pair.shape[1], dtype=xp.float64, device=A.device)
    for at, base, tuned in _blocks(pair):
        adapted = base + _product(B[at], A, base)
        inner += _dots(adapted.T, tuned.T)
        squares += _dots(adapted.T, adapted.T)
    if not bool(xp.all(squares > 0)):
        raise FitError("a column of the weight is zero, so it has no direction for a magnitude to scale")
    gain, error = inner / squares, 0.0
    for at, base, tuned in _blocks(pair):
        error += _missed(base, tuned, _product(B[at], A, base), gain)
    return Magnitudes(gain * xp.sqrt(squares), gain, math.sqrt(error), gain[:0])


def row_share(rest: Array, adapted: Array) -> tuple[Array, Array]:
    """Measure how much of a LoRA's residual is a rescaling of rows, which tells whether alternation can win.

    From some rows `rest` of ``W' - W - B A``, ``(..., rows, in)``, and the same rows of ``W + B A``: ``(energy along
    W + B A, energy)``, of which the first is what row scales alone would remove, less chance alignment.
    """
    xp = namespace(rest)
    along = xp.sum(_ratio(_dots(rest, adapted) ** 2, _dots(adapted, adapted), nothing=0.0), axis=-1)
    energy = xp.sum(_dots(rest, rest), axis=-1)
    return along - energy / max(rest.shape[-1], 1), energy


@dataclass(frozen=True)
class _Scaled:
    """``diag(c) W' - W``; satisfies `surgery_formats.linalg.matrix.MatrixSource`."""

    pair: PairSource
    scales: Array

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.pair.shape

    def rows(self, start: int, stop: int) -> Array:
        """Rows ``start:stop``, formed as differences of nearly equal values."""
        base, tuned = self.pair.rows(start, stop)
        change = tuned - base
        change += cast(self.scales[start:stop, None] - 1, dtype_of(base)) * tuned
        return change


def _scaled(pair: PairSource, scales: Array, device: str | None) -> Array | MatrixSource:
    source = _Scaled(pair, scales)
    if not isinstance(pair, HeldPair):
        return source
    held = source.rows(0, pair.shape[0])
    return held if device is None else to_device(held, device)


def _aligned(pair: PairSource) -> Array:
    """Return the row scales for zero factors."""
    scales = [_ratio(_dots(base, tuned), _dots(tuned, tuned)) for _, base, tuned in _blocks(pair)]
    return namespace(*scales).concat(scales)


def _norms(pair: PairSource) -> tuple[float, float]:
    total = size = 0.0
    for _, base, tuned in _blocks(pair):
        total += _energy(tuned - base)
        size += _energy(tuned)
    return math.sqrt(total), math.sqrt(size)


def _blocks(pair: PairSource) -> Iterator[tuple[slice, Array, Array]]:
    """Some rows at a time, with W and W' in them."""
    rows, cols = pair.shape
    read, cached = (max(1, size // max(cols, 1)) for size in (_BLOCK, _CACHED))
    for start in range(0, rows, read):
        base, tuned = pair.rows(start, min(start + read, rows))
        step = read if is_torch(base) else cached
        for at in range(0, len(base), step):
            part = slice(at, at + step)
            yield slice(start + at, start + at + len(base[part])), base[part], tuned[part]


def _product(B: Array, A: Array, like: Array) -> Array:
    return cast(B, dtype_of(like)) @ cast(A, dtype_of(like))


def _missed(base: Array, tuned: Array, change: Array, gain: Array) -> float:
    """``||W' - g (W + BA)||^2 = ||(W' - W) + (1 - g) W - g BA||^2``: three small terms; overwrites `change` with BA."""
    rest = tuned - base
    rest += cast(1 - gain, dtype_of(base)) * base
    change *= cast(gain, dtype_of(base))
    rest -= change
    return _energy(rest)


def _energy(block: Array) -> float:
    return float(namespace(block).sum(_dots(block, block)))


def _dots(left: Array, right: Array) -> Array:
    """Inner products row by row, summed in float64."""
    xp = namespace(left, right)
    return xp.sum(left * right, axis=-1, dtype=xp.float64)


def _ratio(over: Array, under: Array, nothing: float = 1.0) -> Array:
    return namespace(under).where(under > 0, over / under.clip(min=_TINY), nothing)
