# SPDX-License-Identifier: Apache-2.0
"""How far a merged tensor is from the float64 answer: relative error, error in ulp, and bit differences that matter."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bit_differences", "relative_error", "ulp", "ulp_error"]

_MANTISSA = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}
_MIN_EXPONENT = {torch.float32: -126, torch.bfloat16: -126, torch.float16: -14}


def relative_error(actual: Tensor, reference64: Tensor) -> float:
    """Largest difference as a share of the largest reference value (both empty: 0)."""
    if actual.shape != reference64.shape:
        return float("inf")
    if not actual.numel():
        return 0.0
    scale = reference64.abs().max().clamp_min(1e-300)
    return float((actual.double() - reference64.double()).abs().max() / scale)


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of ``dtype`` at ``magnitude`` (float64, same shape)."""
    exponent = torch.frexp(magnitude.double()).exponent - 1
    return torch.exp2(exponent.clamp_min(_MIN_EXPONENT[dtype]).double() - _MANTISSA[dtype])


def ulp_error(actual: Tensor, reference64: Tensor, base: Tensor | None = None) -> float:
    """Largest error in ulp of ``actual.dtype`` at max(|W|, |W'|); ``base`` is W where it has the same shape."""
    if actual.shape != reference64.shape:
        return float("inf")
    magnitude = reference64.abs()
    if base is not None and base.shape == reference64.shape:
        magnitude = torch.maximum(magnitude, base.double().abs())
    return (
        float(((actual.double() - reference64).abs() / ulp(magnitude, actual.dtype)).max()) if actual.numel() else 0.0
    )


def bit_differences(actual: Tensor, peft: Tensor, reference64: Tensor, base: Tensor | None = None) -> int:
    """Values where ``actual`` and ``peft`` differ although the float64 answer is no rounding tie.

    Two correct float32 evaluations in another order differ by a few 2^-24 of the largest intermediate (W, delta or W'). Where the
    float64 answer lies that near to the midpoint of two stored values, either neighbour is right; everywhere else both must hold
    the same bits. Without ``base`` the largest value of the tensor stands for the intermediates.
    """
    magnitude = reference64.abs() if base is not None else reference64.abs().max()
    if base is not None and base.shape == reference64.shape:
        magnitude = magnitude + 2 * base.double().abs()  # |delta| <= |W| + |W'|
    step = ulp(reference64.abs(), actual.dtype)
    from_midpoint = ((reference64 / step).remainder(1.0) - 0.5).abs() * step
    tie = from_midpoint < 8 * 2.0**-24 * magnitude
    return int(((actual != peft) & ~tie).sum())
