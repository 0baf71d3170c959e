# SPDX-License-Identifier: Apache-2.0
"""Matrices whose singular values are known without computing them: a diagonal between two random orthogonal transforms."""

from __future__ import annotations

import math

import torch

from surgery_formats.linalg.svd import TruncatedSVD

KINDS = ("fast", "power", "flat", "spiked", "bulk", "low")


def spectrum(kind: str, k: int) -> torch.Tensor:
    i = torch.arange(1, k + 1, dtype=torch.float64)
    if kind == "spiked":  # Marchenko-Pastur-like: directions that stand out of a dense bulk
        out = min(24, k // 2)
        return torch.cat([torch.linspace(3, 1.1, out).double(), torch.linspace(1, 1e-4, k - out).double().sqrt()])
    return {
        "fast": torch.exp(-i / 12) + 1e-6,
        "power": i**-0.7,
        "flat": i**-0.35,
        "bulk": (1 - (i - 0.5) / k).sqrt(),
        "low": torch.where(i <= 12, 1 / i, 0.0),
    }[kind]


def _walsh(x: torch.Tensor) -> torch.Tensor:
    rows, width = len(x), 1
    while width < rows:
        pairs = x.view(rows // (2 * width), 2, width, -1)
        x = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).reshape(rows, -1)
        width *= 2
    return x / math.sqrt(rows)


def _mixed(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    for _ in range(2):
        x = _walsh(x * (torch.randint(0, 2, (len(x), 1), generator=g) * 2 - 1))
    return x


def made(m: int, n: int, kind: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 ``(m, n)`` matrix, sides powers of two, and its singular values."""
    g, s = torch.Generator().manual_seed(seed), spectrum(kind, min(m, n))
    d = torch.zeros(m, n, dtype=torch.float64)
    d.diagonal().copy_(s)
    return _mixed(_mixed(d, g).T.contiguous(), g).T.contiguous().float(), s


def true_error(d: torch.Tensor, found: TruncatedSVD) -> float:
    return float((d.double() - (found.U.double() * found.S.double()) @ found.V.double().T).norm())


def check(d: torch.Tensor, s: torch.Tensor, found: TruncatedSVD, rank: int) -> None:
    """All that `truncated_svd` promises at a rank, against the true error and the true singular values `s` of `d`."""
    assert found.U.shape == (d.shape[0], rank)
    assert found.V.shape == (d.shape[1], rank)
    error, best, total = true_error(d, found), float(s[rank:].square().sum().sqrt()), float(s.norm())
    assert error <= 1.001 * best or error <= 1e-6 * total, (error / best, error / total)
    assert abs(found.residual - error) <= 0.01 * error
    assert abs(found.total - total) <= 1e-6 * total
    assert 1 <= found.bound <= 1.001
    if error > 1e-6 * total:
        assert error <= found.bound * best * (1 + 1e-7), (error / best, found.bound)
    for basis in (found.U, found.V):
        assert float((basis.double().T @ basis.double() - torch.eye(rank)).abs().max()) <= 2e-6
    assert bool((found.S[:-1] >= found.S[1:]).all())
    assert bool((found.S.double() <= s[:rank] + 1e-6 * total).all())  # Ritz values approach from below
