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

from surgery_formats.arrays import Array, all_finite, array_of, cast, dtype_of, namespace, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.matrix import add_gram
from surgery_formats.linalg.svd import truncated_svd
from surgery_formats.threads import one_thread

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

    basis: Array
    energies: Array
    mean: Array | None

    def times_power(self, matrix: Array, power: float) -> Array:
        """``matrix (C + damping)^power``, in the matrix's dtype, ``(rows, in)``; C itself is never formed."""
        damping = DAMPING * float(self.energies.sum()) / len(self.basis)
        floor = damping**power
        stretch, basis = (
            array_of(part, dtype_of(matrix), matrix)
            for part in ((self.energies + damping) ** power - floor, self.basis)
        )
        return matrix * floor + ((matrix @ basis) * stretch) @ basis.T


def moment_of_inputs(blocks: Iterable[Array], count: int) -> Moment:
    """Moment of `count` raw activations, in blocks ``(n_i, in)``, one input of the module per row.

    Holds one block and one matrix of the module's width at most.

    Raises:
        FitError: NaN or infinity, no rows, or only zeros.
    """
    few: list[Array] = []
    total = gram = None
    anything = False
    for block in blocks:
        _check_finite(block)
        xp, exact = namespace(block), cast(block, DType.F64)
        anything = anything or bool(xp.any(exact != 0))
        size, column_sums = exact.shape[1], xp.sum(exact, axis=0)
        total = column_sums if total is None else total + column_sums
        if count < size:
            few.append(exact)
            continue
        gram = xp.zeros((size, size), dtype=xp.float64, device=exact.device) if gram is None else gram
        with one_thread():
            add_gram(gram, exact)
    if total is None or not anything:
        raise FitError("holds no input other than zero")
    mean = total / count
    if gram is not None:
        return _moment(gram / count, mean)
    scaled = namespace(mean).concat(few) / math.sqrt(count)
    with one_thread():  # the small Gram matrix has the same eigenvalues
        energies, vectors = _eigenvectors(scaled @ scaled.T)
        return Moment(scaled.T @ (vectors / energies**0.5), energies, mean)


def moment_of_gram(gram: Array, mean: Array | None = None) -> Moment:
    """Moment from `gram` ``E x x^T``, ``(in, in)``, symmetric, positive semidefinite, and the mean ``E x``, ``(in,)``.

    Raises:
        FitError: `gram` is not such a matrix, or no inputs have this mean and this second moment.
    """
    _check_finite(gram)
    if mean is not None:
        _check_finite(mean)
    xp, exact = namespace(gram), cast(gram, DType.F64)
    size = float(xp.max(xp.abs(exact))) if len(exact) else 0.0
    if not size:
        raise FitError("holds no input other than zero")
    if float(xp.max(xp.abs(exact - exact.T))) > _UNSYMMETRIC * size:
        raise FitError("is not a second moment: it is not symmetric")
    moment = _moment((exact + exact.T) / 2, None if mean is None else cast(mean, DType.F64))
    if moment.mean is not None:
        along = moment.basis.T @ moment.mean
        beside = moment.mean - moment.basis @ along
        if float(beside @ beside) > 1e-6 * size or float(along @ (along / moment.energies)) > 1 + _UNSYMMETRIC:
            raise FitError("is not a possible mean of inputs with this second moment")
    return moment


def _moment(gram: Array, mean: Array | None) -> Moment:
    with one_thread():
        energies, vectors = _eigenvectors(gram)
    return Moment(vectors, energies, mean)


def _eigenvectors(gram: Array) -> tuple[Array, Array]:
    """Eigenvalues that are not rounding noise, ``(k,)``, ascending, and their vectors, ``(n, k)``."""
    energies, vectors = namespace(gram).linalg.eigh(gram)
    if float(energies[0]) < -_UNSYMMETRIC * float(energies[-1]):
        raise FitError("is not a second moment: it has negative eigenvalues")
    keep = energies > _NOTHING * energies[-1]
    return energies[keep], vectors[:, keep]


def _check_finite(values: Array) -> None:
    if not all_finite(values):
        raise FitError("holds NaN or Inf")


def output_energy(matrix: Array, moment: Moment, away: Array | None = None) -> float:
    """``E ||matrix (x - away)||^2`` over the inputs, with `matrix` ``(out, in)``, usually what factors leave of a difference.

    `away`, ``(in,)``, is the mean that a bias removes, possibly from other inputs. It is used only if the moment has a mean.
    """
    with one_thread():
        exact = array_of(to_cpu(matrix), DType.F64, moment.basis)
        total = float(namespace(exact).sum((exact @ moment.basis) ** 2, axis=0) @ moment.energies)
        if away is not None and moment.mean is not None:
            taken = exact @ away
            total += float(taken @ taken) - 2 * float(taken @ (exact @ moment.mean))
    return max(total, 0.0)


def weighted_factors(
    delta: Array, moment: Moment, rank: int, *, power: float = HALF, seed: int = 0
) -> tuple[Array, Array]:
    """``B (out, r)`` and ``A (r, in)`` that minimise ``||(D - B A) (C + damping)^power||_F`` for a `delta` D, ``(out, in)``.

    The rank is capped at ``min(out, in)``. A `power` of 1/2 minimises the error on the inputs at hand.
    """
    with one_thread():
        svd = truncated_svd(moment.times_power(delta, power), rank=rank, seed=seed)
        xp, (left, right) = namespace(delta), svd.factors()
        right = moment.times_power(right, -power)
        # undo the weighting, and share lengths evenly again: neither factor may underflow in 16 bits
        lengths = xp.linalg.vector_norm(left, axis=0).clip(min=float(xp.finfo(left.dtype).smallest_normal))
        even = xp.sqrt(xp.linalg.vector_norm(right, axis=1) / lengths)
        even = xp.where(even > 0, even, 1.0)
        return left * even, right / even[:, None]
