# SPDX-License-Identifier: Apache-2.0
"""Factors in the type of their slot: refused where that type loses the change, as `surgery convert` refuses it.

A graph of 16 bits stores A and B apart. B of 1e6 is infinite in fp16, A of 1e-8 is zero, and the product that an adapter was trained for
is gone, though its own values would fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery_formats.errors import FitError

__all__ = ["LARGEST_LOSS", "stored_array", "stored_factors"]

Array = npt.NDArray[Any]
_HINT = '`dtype="fp32"` keeps it, or `dtype="bf16"`'
_SHORT = {"float16": "fp16", "bfloat16": "bf16"}

LARGEST_LOSS = 2.0**-7
"""Of a change's norm that rounding may take: twice what the eight bits of bf16 take of both factors."""


def stored_array(values: Array, dtype: Any, name: str, file: Path | None = None) -> Array:
    """`values` in another type; `name` and `file` are what messages call them.

    Raises:
        FitError: one is not finite there.
    """
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored.astype(np.float32)).all():
        kind = _SHORT.get(np.dtype(dtype).name)
        what = f"NaN, Inf, or a value too large for {kind or 'fp32'}"
        raise FitError(what, file=file, tensor=name, hint=_HINT if kind else None)
    return stored


def stored_factors(A: Array, B: Array, dtype: Any, name: str, file: Path | None = None) -> tuple[Array, Array]:
    """``(in, rank)`` and ``(rank, out)`` in the type of a slot.

    Args:
        A: The first factor.
        B: The second, with all scales.
        dtype: The slot's.
        name: What messages call the weight.
        file: The adapter's.

    Raises:
        FitError: a value that is not finite in that type, or a product that is another.
    """
    stored = stored_array(A, dtype, name, file), stored_array(B, dtype, name, file)
    if stored[0].dtype.itemsize < A.dtype.itemsize and (lost := _lost(A, B, *stored)) > LARGEST_LOSS:
        kind = _SHORT.get(np.dtype(dtype).name, "its type")
        what = f"{kind} loses {min(lost, 1.0):.0%} of the change: its factors are too small for that"
        raise FitError(what, file=file, tensor=name, hint=_HINT)
    return stored


def _lost(A: Array, B: Array, rounded_A: Array, rounded_B: Array) -> float:
    """Norm of ``A B - A' B'``, relative to that of ``A B``: of Gram matrices alone, so that no product is ever as large as a weight."""
    exact = A.astype(np.float64), B.astype(np.float64)
    other = rounded_A.astype(np.float64), rounded_B.astype(np.float64)
    # A B - A' B' = (A - A') B + A' (B - B'), whose terms do not cancel
    left = np.concatenate([exact[0] - other[0], other[0]], 1)
    right = np.concatenate([exact[1], exact[1] - other[1]], 0)
    size = _norm(*exact)
    return _norm(left, right) / size if size else 0.0


def _norm(left: Array, right: Array) -> float:
    """Frobenius norm of ``left right``: ``tr(left^T left right right^T)``."""
    return float(np.sqrt(max(0.0, float(np.sum((left.T @ left) * (right @ right.T))))))
