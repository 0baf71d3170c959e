# SPDX-License-Identifier: Apache-2.0
"""Slopes of ALiBi (arXiv:2108.12409), as BLOOM and Falcon, and as MPT, take them for numbers that are no power of two."""

from __future__ import annotations

import math

__all__ = ["bloom_slopes", "mpt_slopes"]


def bloom_slopes(heads: int) -> tuple[float, ...]:
    """A geometric series for the greatest power of two of heads; the rest come from that of twice as many."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (n + 1) / power) for n in range(power)]
    return (*slopes, *(2 ** (-8 * (2 * n + 1) / (2 * power)) for n in range(heads - power)))


def mpt_slopes(heads: int) -> tuple[float, ...]:
    """A geometric series for the least power of two of heads; every other one of it comes first."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2 ** (-8 * (n + 1) / power) for n in range(power)]
    return tuple(slopes) if power == heads else tuple((slopes[1::2] + slopes[::2])[:heads])
