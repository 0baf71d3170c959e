# SPDX-License-Identifier: Apache-2.0
"""Adaptive block Krylov: the leading singular vectors of a matrix from a few products with it.

Block Golub-Kahan with full re-orthogonalisation and Rayleigh-Ritz on the whole basis (Musco and Musco,
arXiv:1504.05477; block sizes after Meyer, Musco and Musco, arXiv:2305.02535). A new block is orthogonalised against the
basis before *and after* it is normalised: on a difference of low rank, such as a merged LoRA, the remainder is rounding
noise, and normalising amplifies its overlap with the basis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from surgery_formats.linalg.certificate import Convergence, allowed_excess, excess_energy, outside_norm, ratio_bound
from surgery_formats.linalg.matrix import Operator
from surgery_formats.linalg.panel import noise, orthonormal, within, without

__all__ = ["CertifiedBasis", "block_size", "krylov"]

_EXACT = 5e-7
"""Residual, relative to the norm, below which a matrix has exactly the requested rank."""
_ROUNDING = 16.0
"""Units in the last place, relative to the norm, that products and orthogonalisation may lose."""
_LOOK = 1e-6
"""Share of the energy below which the residual is measured, because the difference of energies is rounding noise."""


@dataclass(frozen=True, slots=True)
class CertifiedBasis:
    """A basis with its error bound, for ``M`` of the `Operator`.

    Attributes:
        left: ``(r, short)``, rows orthonormal to rounding.
        right: ``left M``, ``(r, long)``.
        excess: Bound on the energy missed, see `surgery_formats.linalg.certificate`.
        steps: Blocks in the basis.
    """

    left: torch.Tensor
    right: torch.Tensor
    excess: float
    steps: int


def block_size(rank: int | None) -> int:
    """Columns per block: one block for a small rank; for a large one, smaller blocks need fewer products in total."""
    if rank is None:
        return 32
    return rank + 8 if rank <= 32 else min(128, max(40, (rank // 2 + 7) // 8 * 8))


def krylov(
    op: Operator,
    choose: Callable[[torch.Tensor, float], int | None],
    block: int,
    most: int,
    target: float,
    seed: int,
) -> CertifiedBasis | None:
    """Extend a basis by `block` columns per step until it is certified; None if `most` columns were not enough.

    `choose` maps ``(theta^2 descending, ||M||_F^2)`` to the number to keep, None if the basis holds too few. `target` is the
    greatest acceptable ratio to the optimum; if float32 is too coarse for it, float64 is used.
    """
    rounding = (_ROUNDING * torch.finfo(op.dtype).eps) ** 2 * op.norm2
    basis = torch.empty(min(most, 8 * block) + block, op.short, dtype=op.dtype, device=op.device)  # rows are vectors
    image = torch.empty(len(basis), op.long, dtype=op.dtype, device=op.device)
    small = torch.zeros(len(basis), len(basis), dtype=torch.float64)
    filler = noise((block, op.short), seed + 1, op.dtype, op.device)
    fresh = op.times(noise((block, op.long), seed, op.dtype, op.device))
    support = (fresh != 0).any(0)  # non-zero rows of M: zero rows are part of no direction
    size, steps, next_check, progress = 0, 0, 0, Convergence()
    while size + block <= most:
        if size + block > len(basis):
            basis, image = _grown(basis, len(basis)), _grown(image, len(image))
            small = torch.nn.functional.pad(small, (0, len(small), 0, len(small)))
        old, at, size, steps = size, slice(size, size + block), size + block, steps + 1
        basis[at] = _next(fresh, basis[:old], filler.roll(steps, 1))
        image[at] = op.adjoint(basis[at])
        fresh = without(op.times(image[at]), basis[:size])
        new, wide = image[at].double() @ image[:size].double().T, fresh.double()
        new, beyond = torch.split(torch.cat([new, wide @ wide.T], 1).cpu(), [size, block], 1)  # the only wait of a step
        small[at, :size], small[:size, at] = new, new.T
        if size < next_check:
            continue
        next_check = int(size * 1.12)  # the eigenvectors of a large basis cost more than a step
        ritz, vectors = torch.linalg.eigh(small[:size, :size])
        ritz, vectors = ritz.flip(0).clamp_min(0), vectors.flip(1)
        keep = choose(ritz, op.norm2)
        if keep is None:
            if _hopeless(ritz, op.norm2, choose, most):
                return None
            continue
        if keep >= size:
            continue
        energy = float(ritz[:keep].sum())
        rest = op.norm2 - energy
        enough = allowed_excess(rest, target) - rounding
        excess = progress.expected(keep, size, energy)
        if excess > enough:  # cheap bounds first
            last, near = vectors[old:], slice(max(0, old - block), size)
            edge = outside_norm(small[near, near], beyond)
            excess = min(excess, excess_energy(ritz, last.T @ (beyond @ last), keep, edge, enough))
        excess += rounding
        best = None
        if rest < _LOOK * op.norm2:
            best = _ritz_vectors(basis[:size], image[:size], vectors[:, :keep], support, excess, steps)
            rest = residual(op, best) ** 2
            if rest <= _EXACT**2 * op.norm2:
                return best
            if ratio_bound(rest, rounding) > target and op.dtype == torch.float32:
                return krylov(op.in_float64(), choose, block, most, target, seed)
        if ratio_bound(rest, excess) <= target:
            return best or _ritz_vectors(basis[:size], image[:size], vectors[:, :keep], support, excess, steps)
    return None


def residual(op: Operator, approximation: CertifiedBasis) -> float:
    """``||M - left^T right||_F``, formed element by element."""
    left, right = (approximation.right, approximation.left) if op.turned else (approximation.left, approximation.right)
    return math.sqrt(float(op.left_over(left.T, right, op.dtype).sum()))


def _hopeless(ritz: torch.Tensor, norm2: float, choose: Callable[[torch.Tensor, float], int | None], most: int) -> bool:
    """Whether even `most` columns, all as large as the smallest converged value so far, would hold too little."""
    typical = float(ritz[len(ritz) // 2])
    more = max(0, most - len(ritz))
    imagined = torch.cat([ritz, torch.full((more,), typical, dtype=ritz.dtype)])
    return choose(imagined, norm2) is None


def _ritz_vectors(
    basis: torch.Tensor, image: torch.Tensor, vectors: torch.Tensor, support: torch.Tensor, excess: float, steps: int
) -> CertifiedBasis:
    chosen = vectors.T.to(basis.device, basis.dtype)
    return CertifiedBasis(within(chosen @ basis, support), chosen @ image, excess, steps)


def _next(block: torch.Tensor, basis: torch.Tensor, filler: torch.Tensor) -> torch.Tensor:
    fresh = orthonormal(block, filler)
    return orthonormal(without(fresh.to(basis.dtype), basis), filler) if len(basis) else fresh


def _grown(rows: torch.Tensor, more: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_empty(more, rows.shape[1])])
