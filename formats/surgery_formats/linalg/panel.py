# SPDX-License-Identifier: Apache-2.0
"""Orthonormal rows of a panel (a few long vectors), by Cholesky of its Gram matrix in float64.

Householder QR of tall panels is slow on a GPU, and slower than products on a CPU. Shifted CholeskyQR (Fukaya et al.
2020, arXiv:1809.11085) takes a few small products: a first pass, with a shift that keeps the Gram matrix definite
despite rounding, lowers the condition number enough for two plain passes to reach orthonormality to rounding. Nothing
here waits for the device.
"""

from __future__ import annotations

import torch

__all__ = ["noise", "orthonormal", "within", "without"]

_SHIFT = 1e-13
"""Shift of the first pass, relative to the trace: far above float64 rounding, harmless to directions above 3e-7."""
_FILL = 1e-9
"""Relative size of the added noise: it makes rank-deficient panels independent and leaves others unaffected."""
_INSIDE = 1 - 1e-6  # least norm of the part inside the support
_LEAST = 1e-18  # absolute size of the noise for a panel of zeros; matrices here have a norm of about 1


def noise(shape: tuple[int, int], seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal random numbers, drawn on `device`; reproducible on one type of device."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), dtype=dtype, device=device)


def orthonormal(rows: torch.Tensor, filler: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis ``(b, n)``, float64, of the row space of `rows` ``(b, n)``, ``b <= n``, to rounding.

    `filler`, ``(b, n)``, is noise that completes a rank-deficient panel.
    """
    basis = rows.double()
    size = torch.linalg.vector_norm(basis) / basis.shape[0] ** 0.5 / basis.shape[1] ** 0.5
    basis = torch.addcmul(basis, filler.double(), size * _FILL + _LEAST)
    for shift in (_SHIFT, _SHIFT * 1e-3, 0.0):
        gram = basis @ basis.T
        if shift:
            gram.diagonal().add_(gram.diagonal().sum() * shift)
        basis = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram)[0], basis, upper=False)
    return basis


def within(rows: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """Unit `rows` ``(b, n)`` with exact zeros outside `support` ``(n,)``; vectors that lie outside are unchanged."""
    kept = rows * support
    return torch.where(torch.linalg.vector_norm(kept, dim=1, keepdim=True) > _INSIDE, kept, rows)


def without(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """`rows` ``(b, n)`` minus their projection on the orthonormal rows of `basis`; two passes are enough."""
    for _ in range(2 if len(basis) else 0):
        rows = torch.addmm(rows, rows @ basis.T, basis, alpha=-1)
    return rows
