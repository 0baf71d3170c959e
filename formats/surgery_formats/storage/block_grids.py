# SPDX-License-Identifier: Apache-2.0
"""Scales and zero points for blocks of inputs, from the values alone: at once, or by looking for the least error.

The search is that of llama.cpp's k-quants (`make_qx_quants`, ggml-quants.c): a few scales around the plain one, for each the
codes, for these the scale of the least squares, and the best of all.
"""

from __future__ import annotations

from surgery_formats.arrays import Array, cast
from surgery_formats.dtypes import DType
from surgery_formats.storage.block_format import BlockFormat
from surgery_formats.storage.fitting import fit_minmax, stored_scales
from surgery_formats.storage.grouped_grid import GroupedGrid

__all__ = ["block_grid"]

_TRIED = (1.0, 0.94, 0.88, 0.82, 1.06)
"""Shares of the plain scale. More were no better: a scale of the least squares is taken for the codes of each."""


def block_grid(values: Array, form: BlockFormat, weights: Array | None = None) -> GroupedGrid:
    """A grid for float32 ``(rows, inputs)``.

    Args:
        values: Finite.
        form: What it is like.
        weights: ``(inputs,)``, what a squared error weighs where scales are looked for; None for all the same.
    """
    import numpy as np

    rows, inputs = values.shape
    count = -(-inputs // form.block)
    if missing := count * form.block - inputs:
        values = np.pad(values, ((0, 0), (0, missing)))
    # A column for each block: numpy reduces long rows several times faster than many short ones.
    parted = np.ascontiguousarray(values.reshape(rows * count, form.block).T)
    scales, zeros = _plain(parted, form)
    if form.search:
        weighted = None
        if weights is not None:
            padded = cast(np.pad(weights, (0, missing)).reshape(count, form.block), DType.F32)
            weighted = np.tile(padded.T, (1, rows))
        scales = _searched(parted, scales, zeros, form.largest, weighted)
    scales = np.where(scales < 0, np.float32(-1), np.float32(1)) * stored_scales(abs(scales), form.scale_type)
    shape = (rows, count)
    return GroupedGrid(scales.reshape(shape), zeros.reshape(shape), None, form.block, 1, form.largest, fitted=True)


def _plain(parted: Array, form: BlockFormat) -> tuple[Array, Array]:
    """Symmetric: the value farthest from 0 has the lowest code, of which there is one more than above the middle."""
    import numpy as np

    if not form.symmetric:
        fitted = fit_minmax(parted[None], form.bits)
        return fitted.scales[0], fitted.offsets[0]
    middle = np.float32(1 << (form.bits - 1))
    low, high = parted.min(0), parted.max(0)
    edge = np.where(-low >= high, low, high)
    scales = np.where(edge == 0, np.float32(1), -edge / middle)
    return scales, np.full_like(scales, middle)


def _searched(parted: Array, scales: Array, zeros: Array, largest: int, weights: Array | None) -> Array:
    """Per block, the scale that leaves the least squared error."""
    import numpy as np

    best, least = scales.copy(), np.full(len(scales), np.float32(np.inf))
    low, high = -zeros, np.float32(largest) - zeros
    steps, error = np.empty_like(parted), np.empty_like(parted)
    for share in _TRIED:
        tried = scales * np.float32(share)
        for _ in range(2):  # the scale itself, and that of the least squares for its codes
            np.divide(parted, tried, out=steps)
            np.rint(steps, out=steps)
            np.clip(steps, low, high, out=steps)
            np.multiply(steps, tried, out=error)
            error -= parted
            error *= error
            if weights is not None:
                error *= weights
            errors = error.sum(0)
            better = errors < least
            best[better], least[better] = tried[better], errors[better]
            heavy = steps if weights is None else np.multiply(steps, weights, out=error)
            moment, fits = (heavy * steps).sum(0), (heavy * parted).sum(0)
            fits /= np.where(moment > 0, moment, np.float32(1))
            tried = np.where((moment > 0) & (fits != 0), fits, tried)
    return best
