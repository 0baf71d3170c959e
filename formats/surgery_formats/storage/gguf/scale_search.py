# SPDX-License-Identifier: Apache-2.0
"""The searches for scales of llama.cpp's reference quantiser (``ggml-quants.c``), over all groups at once.

Arrays are float32 ``(codes, groups)``, one column a group. Sums run from the first code to the last in float32, as the
loops of the reference do, so that the scales are the reference's to the bit where its compiler fuses no operations.
"""

from __future__ import annotations

from surgery_formats.arrays import Array

__all__ = ["scale_and_min", "signed_scale", "stepwise_scale"]

_NOTHING = 1e-15  # GROUP_MAX_EPS: a group of smaller values is one of zeros


def scale_and_min(
    values: Array,
    weights: Array,
    greatest: int,
    first: float,
    steps: int,
    *,
    absolute: bool,
) -> tuple[Array, Array]:
    """``make_qkx2_quants``: scale and negated minimum by least squares over the codes of several trial scales.

    Args:
        values: To be stored as ``scale * code - minimum`` with codes from 0.
        weights: Of the squared errors.
        greatest: Code.
        first: The trial scales have ``greatest + first`` and 0.1 more each time in place of `greatest`.
        steps: The last trial.
        absolute: Trials are compared by the sum of absolute errors rather than of squares.
    """
    import numpy as np

    low, high = np.minimum(values.min(axis=0), np.float32(0)), values.max(axis=0)
    sum_w, sum_x = _sum(weights), _sum(weights * values)
    flat = high == low
    span = np.where(flat, np.float32(1), high - low)
    least = low

    def coded(inverse: Array) -> Array:
        codes = values - least
        codes *= inverse
        return np.clip(np.rint(codes, out=codes), 0, greatest, out=codes)

    def error(codes: Array, scale: Array, minimum: Array) -> Array:
        apart = scale * codes
        apart += minimum
        apart -= values
        apart = np.abs(apart, out=apart) if absolute else np.multiply(apart, apart, out=apart)
        apart *= weights
        return _sum(apart)

    inverse = np.float32(greatest) / span
    scale, minimum = 1 / inverse, low.copy()
    best = error(coded(inverse), scale, minimum)
    for step in range(steps + 1):
        # The minimum that the codes are taken from is the best so far.
        inverse = (np.float32(first) + np.float32(0.1) * np.float32(step) + np.float32(greatest)) / _span(high, minimum)
        least = minimum
        codes = coded(inverse)
        weighted = weights * codes
        sum_l, sum_l2, sum_xl = _sum(weighted), _sum(weighted * codes), _sum(weighted * values)
        spread = sum_w * sum_l2 - sum_l * sum_l
        with np.errstate(divide="ignore", invalid="ignore"):
            trial = (sum_w * sum_xl - sum_x * sum_l) / spread
            trial_min = (sum_l2 * sum_x - sum_l * sum_xl) / spread
            above = trial_min > 0
            trial = np.where(above, sum_xl / sum_l2, trial)
        trial_min = np.where(above, np.float32(0), trial_min)
        usable = spread > 0
        trial, trial_min = np.where(usable, trial, scale), np.where(usable, trial_min, minimum)
        errors = error(codes, trial, trial_min)
        better = usable & (errors < best)
        scale, minimum = np.where(better, trial, scale), np.where(better, trial_min, minimum)
        best = np.where(better, errors, best)
    return np.where(flat, np.float32(0), scale), -np.where(flat, low, minimum)


def signed_scale(values: Array, half: int) -> Array:
    """``make_qx_quants``: the scale of codes from ``-half``, by least squares over nineteen trial scales."""
    import numpy as np

    largest = _largest(values)
    zero = abs(largest) < _NOTHING
    largest = np.where(zero, np.float32(1), largest)
    squares = values * values
    products = squares * values

    def sums(inverse: Array) -> tuple[Array, Array]:
        codes = _signed(values * inverse, half)
        return _sum(products * codes), _sum(squares * codes * codes)

    sum_lx, sum_l2 = sums(np.float32(-half) / largest)
    scale = _ratio(sum_lx, sum_l2)
    best = scale * sum_lx
    for step in (*range(-9, 0), *range(1, 10)):
        sum_lx, sum_l2 = sums(-(np.float32(half) + np.float32(0.1) * np.float32(step)) / largest)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = np.where(better, _ratio(sum_lx, sum_l2), scale)
        best = np.where(better, scale * sum_lx, best)
    return np.where(zero, np.float32(0), scale)


def stepwise_scale(values: Array, half: int) -> Array:
    """``make_q3_quants``: the scale of codes from ``-half``, which are changed one by one while the error falls."""
    import numpy as np

    largest = _largest(values)
    zero = abs(largest) < _NOTHING
    codes = _signed(values * (np.float32(-half) / np.where(zero, np.float32(1), largest)), half)
    squares = values * values
    products = squares * values
    sum_lx, sum_l2 = _sum(products * codes), _sum(squares * codes * codes)
    for _ in range(5):
        changed = False
        for value, square, product, code in zip(values, squares, products, codes, strict=True):
            rest_lx = sum_lx - product * code
            rest_l2 = sum_l2 - square * code * code
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                other = _signed(np.where(rest_lx > 0, value * rest_l2 / rest_lx, code), half)
            new_lx, new_l2 = rest_lx + product * other, rest_l2 + square * other * other
            better = (rest_lx > 0) & (other != code) & (new_l2 > 0)
            better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            changed = changed or bool(better.any())
            np.copyto(code, other, where=better)
            sum_lx, sum_l2 = np.where(better, new_lx, sum_lx), np.where(better, new_l2, sum_l2)
        if not changed:
            break
    return np.where(zero, np.float32(0), _ratio(sum_lx, sum_l2))


def _sum(terms: Array) -> Array:
    import numpy as np

    return np.add.reduce(terms, axis=0)  # along the first axis numpy adds row after row


def _span(high: Array, low: Array) -> Array:
    import numpy as np

    span = high - low
    return np.where(span == 0, np.float32(1), span)


def _largest(values: Array) -> Array:
    """The first of the values farthest from 0 of each group, with its sign."""
    import numpy as np

    return np.take_along_axis(values, abs(values).argmax(axis=0)[None], axis=0)[0]


def _signed(codes: Array, half: int) -> Array:
    import numpy as np

    return np.clip(np.rint(codes), -half, half - 1)


def _ratio(top: Array, bottom: Array) -> Array:
    import numpy as np

    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
