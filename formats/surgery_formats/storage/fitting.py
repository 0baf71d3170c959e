# SPDX-License-Identifier: Apache-2.0
"""How programs choose the scales and offsets of groups from the values they are to hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from surgery_formats.arrays import Array, cast
from surgery_formats.dtypes import DType

__all__ = ["Fit", "Fitted", "fit_awq", "fit_metal", "fit_minmax", "fit_mlx", "fit_symmetric", "stored_scales"]


class Fitted(NamedTuple):
    """Scales of groups ``(groups, columns)``, and their zero points or, where values are added, biases; float32."""

    scales: Array
    offsets: Array


Fit = Callable[[Array, int, int], Fitted]
"""``fit(values, bits, least)``: of float32 ``(groups, size, columns)``, with zero points of `least` and more."""


def stored_scales(scales: Array, dtype: DType) -> Array:
    """Scales as they will be read: rounded to the stored type, within its range."""
    import numpy as np

    greatest = np.float32(np.finfo(np.float16).max) if dtype is DType.F16 else np.float32(3e38)
    rounded = cast(cast(np.minimum(scales, greatest), dtype), DType.F32)
    least = np.float32(2.0**-24) if dtype is DType.F16 else np.float32(2.0**-126)
    return np.where(rounded == 0, least, rounded)


def fit_minmax(values: Array, bits: int, least: int = 0) -> Fitted:
    """A grid from the least value, or 0, to the greatest, as GPTQ's quantiser has it; groups of zeros from -1 to 1."""
    import numpy as np

    top = np.float32((1 << bits) - 1)
    low, high = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)
    none = low == high
    low, high = np.where(none, np.float32(-1), low), np.where(none, np.float32(1), high)
    scales = (high - low) / top
    zeros = np.rint(-low / scales)
    if least:  # what is stored minus one cannot be zero; the grid moves up instead
        short = zeros < least
        scales = np.where(short, high / (top - least), scales)
        zeros = np.where(short, np.float32(least), zeros)
    return Fitted(scales, zeros)


def fit_symmetric(values: Array, bits: int, least: int = 0) -> Fitted:
    """A grid around 0, as GPTQ's quantiser has it."""
    import numpy as np

    top = (1 << bits) - 1
    most = abs(values).max(1)
    most = np.where(most == 0, np.float32(1), most)
    return Fitted(2 * most / np.float32(top), np.full_like(most, (top + 1) / 2))


def fit_awq(values: Array, bits: int, least: int = 0) -> Fitted:
    """A grid from the least value to the greatest, as autoawq's quantiser has it."""
    import numpy as np

    top = np.float32((1 << bits) - 1)
    low = values.min(1)
    scales = np.maximum(values.max(1) - low, np.float32(1e-5)) / top
    return Fitted(scales, np.clip(-np.rint(low / scales), least, top))


def fit_mlx(values: Array, bits: int, least: int = 0) -> Fitted:
    """A grid on the value that lies farthest from 0, with a step that 0 is a multiple of, as MLX chooses it."""
    import numpy as np

    low, high = values.min(1), values.max(1)
    below = abs(low) > abs(high)
    scales = np.maximum((high - low) / np.float32((1 << bits) - 1), np.float32(1e-7))
    scales = np.where(below, scales, -scales)
    edge = np.where(below, low, high)
    steps = np.rint(edge / scales)
    some = steps != 0
    scales = np.where(some, edge / np.where(some, steps, np.float32(1)), scales)
    return Fitted(scales, np.where(some, edge, np.float32(0)))


def fit_metal(values: Array, bits: int, least: int = 0) -> Fitted:
    """A grid from the least value to the greatest, as transformers' "metal" chooses it."""
    import numpy as np

    low = values.min(1)
    return Fitted(np.maximum((values.max(1) - low) / np.float32((1 << bits) - 1), np.float32(1e-8)), low)
