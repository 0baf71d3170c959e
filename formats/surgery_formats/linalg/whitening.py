# SPDX-License-Identifier: Apache-2.0
"""Factors that are best for the inputs a module actually receives.

Leaving out R changes a module's outputs by ``E ||R x||^2 = tr(R C R^T)`` with ``C = E x x^T``, so the best R comes from
the SVD of ``D C^(1/2)`` (SVD-LLM, Wang et al. 2024, arXiv:2403.07378). C is estimated from few inputs; the quarter
power, half-whitening, trusts it less and does better on unseen inputs. If the module has a bias, ``b + R E x`` removes
the mean of the error, and ``tr(R (C - mean mean^T) R^T)`` remains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from surgery_formats.errors import FitError
from surgery_formats.linalg.matrix import one_thread
from surgery_formats.linalg.svd import truncated_svd

__all__ = ["DAMPING", "HALF", "Moment", "moment_of_gram", "moment_of_inputs", "output_energy", "weighted_factors"]

HALF = 0.25
"""Power of C that weights the difference: half of full whitening."""
DAMPING = 1e-2
"""Share of the mean of C's diagonal that is added to it: unseen directions still count."""
_NOTHING = 1e-12
"""Eigenvalues below this share of the largest are rounding noise."""
_UNSYMMETRIC = 1e-3
"""Tolerance for the symmetry and positivity of a Gram matrix, relative to its largest element."""


@dataclass(frozen=True, slots=True)
class Moment:
    """``C = V diag(d) V^T``, the uncentred second moment of a module's inputs.

    Attributes:
        basis: V, ``(in, k)``, float64, orthonormal columns.
        energies: d, ``(k,)``, float64, positive.
        mean: ``E x``, ``(in,)``; None if unknown.
    """

    basis: torch.Tensor
    energies: torch.Tensor
    mean: torch.Tensor | None

    def times_power(self, matrix: torch.Tensor, power: float) -> torch.Tensor:
        """``matrix (C + damping)^power``, in the matrix's dtype, ``(rows, in)``; C itself is never formed."""
        damping = DAMPING * float(self.energies.sum()) / len(self.basis)
        floor = damping**power
        stretch = ((self.energies + damping).pow(power) - floor).to(matrix)
        basis = self.basis.to(matrix)
        product: torch.Tensor = matrix * floor + ((matrix @ basis) * stretch) @ basis.T
        return product


def moment_of_inputs(blocks: Iterable[torch.Tensor], count: int) -> Moment:
    """Moment of `count` raw activations, in blocks ``(n_i, in)``, one input of the module per row.

    Holds one block and one matrix of the module's width at most.

    Raises:
        FitError: NaN or infinity, no rows, or only zeros.
    """
    few: list[torch.Tensor] = []
    total = gram = None
    anything = False
    for block in blocks:
        _check_finite(block)
        anything = anything or bool(block.any())
        exact = block.double()
        size = exact.shape[1]
        total = exact.sum(0) if total is None else total + exact.sum(0)
        if count < size:
            few.append(exact)
            continue
        gram = torch.zeros(size, size, dtype=torch.float64) if gram is None else gram
        with one_thread():
            gram.addmm_(exact.T, exact)
    if total is None or not anything:
        raise FitError("holds no input other than zero")
    mean = total / count
    if gram is not None:
        return _moment(gram / count, mean)
    scaled = torch.cat(few) / math.sqrt(count)
    with one_thread():  # the small Gram matrix has the same eigenvalues
        energies, vectors = torch.linalg.eigh(scaled @ scaled.T)
    keep = energies > _NOTHING * energies.max()
    basis = scaled.T @ vectors[:, keep] / energies[keep].sqrt()
    return Moment(basis, energies[keep], mean)


def moment_of_gram(gram: torch.Tensor, mean: torch.Tensor | None = None) -> Moment:
    """Moment from `gram` ``E x x^T``, ``(in, in)``, symmetric, positive semidefinite, and the mean ``E x``, ``(in,)``.

    Raises:
        FitError: `gram` is not such a matrix, or no inputs have this mean and this second moment.
    """
    _check_finite(gram)
    if mean is not None:
        _check_finite(mean)
    exact = gram.double()
    size = float(exact.abs().max()) if exact.numel() else 0.0
    if not size:
        raise FitError("holds no input other than zero")
    if float((exact - exact.T).abs().max()) > _UNSYMMETRIC * size:
        raise FitError("is not a second moment: it is not symmetric")
    moment = _moment((exact + exact.T) / 2, None if mean is None else mean.double())
    if moment.mean is not None:
        along = moment.basis.T @ moment.mean
        beside = float((moment.mean - moment.basis @ along).square().sum())
        if beside > 1e-6 * size or float((along.square() / moment.energies).sum()) > 1 + _UNSYMMETRIC:
            raise FitError("is not a possible mean of inputs with this second moment")
    return moment


def _moment(gram: torch.Tensor, mean: torch.Tensor | None) -> Moment:
    with one_thread():
        energies, vectors = torch.linalg.eigh(gram)
    if float(energies[0]) < -_UNSYMMETRIC * float(energies[-1]):
        raise FitError("is not a second moment: it has negative eigenvalues")
    keep = energies > _NOTHING * energies[-1]
    return Moment(vectors[:, keep].contiguous(), energies[keep], mean)


def _check_finite(values: torch.Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise FitError("holds NaN or Inf")


def output_energy(matrix: torch.Tensor, moment: Moment, away: torch.Tensor | None = None) -> float:
    """``E ||matrix (x - away)||^2`` over the inputs, with `matrix` ``(out, in)``, usually what factors leave of a difference.

    `away`, ``(in,)``, is the mean that a bias removes, possibly from other inputs. It is used only if the moment has a mean.
    """
    with one_thread():
        exact = matrix.to("cpu", torch.float64)
        total = float((exact @ moment.basis).square().sum(dim=0) @ moment.energies)
        if away is not None and moment.mean is not None:
            taken = exact @ away
            total += float(taken @ taken) - 2 * float(taken @ (exact @ moment.mean))
    return max(total, 0.0)


def weighted_factors(
    delta: torch.Tensor, moment: Moment, rank: int, *, power: float = HALF, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """``B (out, r)`` and ``A (r, in)`` that minimise ``||(D - B A) (C + damping)^power||_F`` for a `delta` D, ``(out, in)``.

    The rank is capped at ``min(out, in)``. A `power` of 1/2 minimises the error on the inputs at hand.
    """
    with torch.no_grad(), one_thread():
        svd = truncated_svd(moment.times_power(delta, power), rank=rank, seed=seed)
        root = svd.S.sqrt()
        left, right = svd.U * root, moment.times_power((svd.V * root).T, -power)
        # undo the weighting, and share lengths evenly again: neither factor may underflow in 16 bits
        even = (right.norm(dim=1) / left.norm(dim=0).clamp_min(torch.finfo(left.dtype).tiny)).sqrt()
        even = torch.where(even > 0, even, 1.0)
        return left * even, right / even[:, None]
