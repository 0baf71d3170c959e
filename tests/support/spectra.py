# SPDX-License-Identifier: Apache-2.0
"""Matrices whose singular values are known without computing them: a diagonal between two random orthogonal transforms."""

from __future__ import annotations

import math

import numpy

from surgery_formats.arrays import to_cpu
from surgery_formats.linalg.svd import TruncatedSVD

KINDS = ("fast", "power", "flat", "spiked", "bulk", "low")


def spectrum(kind: str, k: int) -> numpy.ndarray:
    i = numpy.arange(1.0, k + 1)
    if kind == "spiked":  # Marchenko-Pastur-like: directions that stand out of a dense bulk
        out = min(24, k // 2)
        return numpy.concat([numpy.linspace(3, 1.1, out), numpy.linspace(1, 1e-4, k - out) ** 0.5])
    values: numpy.ndarray = {
        "fast": numpy.exp(-i / 12) + 1e-6,
        "power": i**-0.7,
        "flat": i**-0.35,
        "bulk": (1 - (i - 0.5) / k) ** 0.5,
        "low": numpy.where(i <= 12, 1 / i, 0.0),
    }[kind]
    return values


def _walsh(x: numpy.ndarray) -> numpy.ndarray:
    rows, width = len(x), 1
    while width < rows:
        pairs = x.reshape(rows // (2 * width), 2, width, -1)
        x = numpy.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).reshape(rows, -1)
        width *= 2
    return x / math.sqrt(rows)


def _mixed(x: numpy.ndarray, random: numpy.random.Generator) -> numpy.ndarray:
    for _ in range(2):
        x = _walsh(x * random.choice([-1.0, 1.0], (len(x), 1)))
    return x


def made(m: int, n: int, kind: str, seed: int = 0) -> tuple[numpy.ndarray, numpy.ndarray]:
    """A float32 ``(m, n)`` matrix, sides powers of two, and its singular values."""
    random, s = numpy.random.default_rng(seed), spectrum(kind, min(m, n))
    d = numpy.zeros((m, n))
    numpy.fill_diagonal(d, s)
    mixed = _mixed(numpy.ascontiguousarray(_mixed(d, random).T), random).T
    return numpy.ascontiguousarray(mixed, dtype=numpy.float32), s


def norm(values: numpy.ndarray) -> float:
    """Frobenius, in float64."""
    return float(numpy.linalg.norm(values.astype(numpy.float64)))


def on_cpu(found: TruncatedSVD) -> TruncatedSVD:
    return found._replace(U=to_cpu(found.U), S=to_cpu(found.S), V=to_cpu(found.V))


def true_error(d: numpy.ndarray, found: TruncatedSVD) -> float:
    U, S, V = (side.astype(numpy.float64) for side in on_cpu(found)[:3])
    return norm(d - (U * S) @ V.T)


def check(d: numpy.ndarray, s: numpy.ndarray, found: TruncatedSVD, rank: int) -> None:
    """All that `truncated_svd` promises at a rank, against the true error and the true singular values `s` of `d`."""
    found = on_cpu(found)
    assert found.U.shape == (d.shape[0], rank)
    assert found.V.shape == (d.shape[1], rank)
    error, best, total = true_error(d, found), norm(s[rank:]), norm(s)
    assert error <= 1.001 * best or error <= 1e-6 * total, (error / best, error / total)
    assert abs(found.residual - error) <= 0.01 * error
    assert abs(found.total - total) <= 1e-6 * total
    assert 1 <= found.bound <= 1.001
    if error > 1e-6 * total:
        assert error <= found.bound * best * (1 + 1e-7), (error / best, found.bound)
    for basis in (found.U.astype(numpy.float64), found.V.astype(numpy.float64)):
        assert numpy.abs(basis.T @ basis - numpy.eye(rank)).max() <= 2e-6
    assert (found.S[:-1] >= found.S[1:]).all()
    assert (found.S - s[:rank] <= 1e-6 * total).all()  # Ritz values approach from below
