# SPDX-License-Identifier: Apache-2.0
"""How programs choose scales, and zero points, for blocks of numbers: functions of the lowest and the greatest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from surgery_formats.storage.scaled_grid import Numbers
from surgery_formats.storage.small_floats import E2M3

if TYPE_CHECKING:
    import numpy

__all__ = ["Choose", "absmax", "power_of_two", "spread"]

Choose = Callable[["numpy.ndarray", "numpy.ndarray"], tuple["numpy.ndarray", "numpy.ndarray | None"]]
"""``choose(low, high)``: scales, and zeros if the format has them, for the extremes of blocks."""


def absmax(largest: float) -> Choose:
    """Scales that make the greatest value of a block the greatest number."""

    def choose(low: numpy.ndarray, high: numpy.ndarray) -> tuple[numpy.ndarray, None]:
        import numpy as np

        return np.maximum(-low, high) / np.float32(largest), None

    return choose


def power_of_two(numbers: Numbers) -> Choose:
    """Powers of two as compressed-tensors rounds them: up where the greatest value would be rounded up to one."""

    def choose(low: numpy.ndarray, high: numpy.ndarray) -> tuple[numpy.ndarray, None]:
        import numpy as np

        fraction, exponent = np.frexp(np.maximum(-low, high))  # of 0.5 to 1
        fraction_bits = 3 if numbers is E2M3 else 1
        up = fraction >= np.float32(1 - 2.0 ** -(fraction_bits + 2))
        _, emax = np.frexp(np.float32(numbers.largest))
        scales = np.ldexp(np.float32(1), exponent + up - emax)
        return np.where(fraction > 0, scales, np.float32(0)), None

    return choose


def spread(lowest: float, greatest: float) -> Choose:
    """Scales and zeros that make the extremes of a block, and 0, the ends of the range of codes."""

    def choose(low: numpy.ndarray, high: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        import numpy as np

        low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
        with np.errstate(over="ignore"):  # of values that no format holds
            scales = (high - low) / np.float32(greatest - lowest)
        steps = np.where(scales > 0, scales, np.float32(1))
        return scales, np.clip(np.float32(lowest) - low / steps, np.float32(lowest), np.float32(greatest))

    return choose
