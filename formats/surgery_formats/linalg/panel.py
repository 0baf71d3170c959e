# SPDX-License-Identifier: Apache-2.0
"""Orthonormal rows of a panel, a few long vectors, by Cholesky of its Gram matrix in float64.

Householder QR of tall panels is slow on a GPU, and slower than products on a CPU. Shifted CholeskyQR (Fukaya et al. 2020,
arXiv:1809.11085) is a few small products: the first pass, with a shift that no rounding can make indefinite, brings the condition number
down to what two plain passes make orthonormal to rounding. Nothing here waits for the device.
"""

from __future__ import annotations

import torch

__all__ = ["noise", "orthonormal", "within", "without"]

_SHIFT = 1e-13
"""Of the first pass, relative to the trace: far above float64's rounding of a Gram matrix, and harmless to directions above 3e-7."""
_FILL = 1e-9
"""Size of what is added, relative to the panel: panels of lower rank than they have rows become independent, others do not notice."""
_INSIDE = 1 - 1e-6  # norm of what is inside, at least
_LEAST = 1e-18  # the same, absolute, for a panel of zeros; matrices here have a norm of about 1


def noise(shape: tuple[int, int], seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal numbers, made where they are used; the same each time on one type of device."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), dtype=dtype, device=device)


def orthonormal(rows: torch.Tensor, filler: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the row space, to float64's rounding.

    Args:
        rows: ``(b, n)``, ``b <= n``.
        filler: ``(b, n)``, noise that takes the place of what a panel of lower rank lacks.

    Returns:
        ``(b, n)``, float64.
    """
    made = rows.double()
    size = torch.linalg.vector_norm(made) / made.shape[0] ** 0.5 / made.shape[1] ** 0.5
    made = torch.addcmul(made, filler.double(), size * _FILL + _LEAST)
    for shift in (_SHIFT, _SHIFT * 1e-3, 0.0):
        gram = made @ made.T
        if shift:
            gram.diagonal().add_(gram.diagonal().sum() * shift)
        made = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram)[0], made, upper=False)
    return made


def within(rows: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """Unit `rows` ``(b, n)`` with exact zeros outside `support` ``(n,)``, where a filler left a trace; vectors that lie outside stay."""
    kept = rows * support
    return torch.where(torch.linalg.vector_norm(kept, dim=1, keepdim=True) > _INSIDE, kept, rows)


def without(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """`rows` ``(b, n)`` less what lies in the span of the orthonormal rows of `basis`; twice, which is enough."""
    for _ in range(2 if len(basis) else 0):
        rows = torch.addmm(rows, rows @ basis.T, basis, alpha=-1)
    return rows
