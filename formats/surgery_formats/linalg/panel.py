# SPDX-License-Identifier: Apache-2.0
"""Orthonormal rows of a panel (a few long vectors), by Cholesky of its Gram matrix in float64.

Householder QR of tall panels is slow on a GPU, and slower than products on a CPU. Shifted CholeskyQR (Fukaya et al.
2020, arXiv:1809.11085) takes a few small products: a first pass, with a shift that keeps the Gram matrix definite
despite rounding, lowers the condition number enough for two plain passes to reach orthonormality to rounding. Nothing
here waits for the device. Panels may be stacked along leading axes.
"""

from __future__ import annotations

from surgery_formats.arrays import Array, cast, is_torch, namespace
from surgery_formats.dtypes import DType

__all__ = ["noise", "orthonormal", "positive", "squares", "within", "without"]

_SHIFT = 1e-13
"""Shift of the first pass, relative to the trace: far above float64 rounding, harmless to directions above 3e-7."""
_FILL = 1e-9
"""Relative size of the added noise: it makes rank-deficient panels independent and leaves others unaffected."""
_INSIDE = 1 - 2e-6  # least squared norm of the part inside the support
_LEAST = 1e-18  # absolute size of the noise for a panel of zeros; matrices here have a norm of about 1


def noise(shape: tuple[int, ...], seed: int, dtype: DType, like: Array) -> Array:
    """Normal random numbers, drawn where `like` is, by its library; reproducible on one type of device."""
    if is_torch(like):
        import torch

        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=dtype.torch, device=like.device)
    import numpy

    generated = numpy.random.Generator(numpy.random.Philox(seed % 2**64))
    return generated.standard_normal(shape, dtype.numpy)  # type: ignore[arg-type]  # the stubs know floats only


def squares(rows: Array) -> Array:
    """Squared norm of every row, ``(..., b)`` for ``(..., b, n)``, in the rows' own type."""
    if is_torch(rows):
        return namespace(rows).linalg.vector_norm(rows, axis=-1) ** 2  # `vecdot` forms all products first
    return namespace(rows).linalg.vecdot(rows, rows)


def orthonormal(rows: Array, filler: Array) -> Array:
    """Return an orthonormal basis ``(b, n)``, float64, of the row space of `rows` ``(b, n)``, ``b <= n``, to rounding.

    `filler`, ``(b, n)``, is noise that completes a rank-deficient panel.
    """
    xp, basis = namespace(rows), cast(rows, DType.F64)
    b, n = basis.shape[-2:]
    size = xp.sqrt(xp.sum(squares(basis), axis=-1, keepdims=True)[..., None] / (b * n))
    basis = basis + cast(filler, DType.F64) * (size * _FILL + _LEAST)
    unit = xp.eye(b, dtype=xp.float64, device=basis.device)
    for shift in (_SHIFT, _SHIFT * 1e-3, 0.0):
        gram = basis @ basis.mT
        if shift:
            gram = gram + unit * (xp.linalg.trace(gram)[..., None, None] * shift)
        basis = _inverse_root(gram, unit) @ basis
    return basis


def _inverse_root(gram: Array, unit: Array) -> Array:
    """``L^-1``, lower triangular, of ``gram = L L^T``: a product with it is faster than solving with ``L``."""
    if is_torch(gram):
        import torch

        lower, _ = torch.linalg.cholesky_ex(gram)  # `cholesky` waits for the device, to see whether it failed
        return torch.linalg.solve_triangular(lower, unit, upper=False)
    import numpy

    # Elimination does not pivot in an upper triangle: its inverse is as accurate as a triangular solve.
    return numpy.linalg.inv(numpy.linalg.cholesky(gram, upper=True)).mT


def positive(rows: Array) -> Array:
    """Signs, ``(b, 1)``, that make the element of largest magnitude in each of `rows` ``(b, n)`` positive."""
    xp = namespace(rows)
    return xp.where(xp.max(rows, axis=-1, keepdims=True) < -xp.min(rows, axis=-1, keepdims=True), -1.0, 1.0)


def within(rows: Array, support: Array) -> Array:
    """Unit `rows` ``(b, n)`` with exact zeros outside `support` ``(n,)``; vectors that lie outside are unchanged."""
    kept = rows * support[..., None, :]
    return namespace(rows).where(squares(kept)[..., None] > _INSIDE, kept, rows)


def without(rows: Array, basis: Array) -> Array:
    """`rows` ``(b, n)`` minus their projection on the orthonormal rows of `basis`; two passes are enough."""
    for _ in range(2 if basis.shape[-2] else 0):
        rows = rows - (rows @ basis.mT) @ basis
    return rows
