# SPDX-License-Identifier: Apache-2.0
"""Tensors of a graph that are no weights: worked out by the exporter, or the same everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.onnx.locate.matrix import Matrix

if TYPE_CHECKING:
    import numpy

__all__ = ["known_table"]

_LOOKED_AT = 1 << 22  # elements
_ROWS = 64
_CLOSE = 2e-2  # cosines rounded to 16 bits, at positions up to `_ROWS`


def known_table(matrix: Matrix) -> str:
    """What a tensor is, in words; empty if it is nothing that is known.

    ``every value 1``, ``mask``, ``rotary cosines``, ``rotary sines``, ``rotary frequencies``.
    """
    import numpy

    if matrix.numel > _LOOKED_AT:
        head = matrix.block(0, min(matrix.rows, _ROWS)).astype("f8")
        return _waves(head) if numpy.isfinite(head).all() else ""
    values = matrix.flat(0, matrix.numel).astype("f8")
    distinct = numpy.unique(values[: 1 << 16])
    if len(distinct) == 1 and (values == distinct[0]).all():
        return f"every value {distinct[0]:g}"
    if len(distinct) == 2 and 0 in distinct and (distinct.min() <= -10000 or set(distinct) == {0.0, 1.0}):
        return "mask"
    if matrix.cols == 1:
        return _frequencies(values)
    grid = values.reshape(matrix.rows, matrix.cols)[:_ROWS]
    return _waves(grid) if numpy.isfinite(grid).all() else ""


def _frequencies(values: numpy.ndarray) -> str:
    """Frequencies fall from 1 by equal factors."""
    import numpy

    if len(values) < 4 or abs(values[0] - 1) > 1e-3 or (values <= 0).any():
        return ""
    steps = numpy.diff(numpy.log(values))
    return "rotary frequencies" if (steps < 0).all() and numpy.ptp(steps) < 1e-2 * abs(steps.mean()) else ""


def _waves(grid: numpy.ndarray) -> str:
    """Cosines or sines of position times frequency, row by row."""
    import numpy

    if len(grid) < 4 or grid.shape[1] < 2 or numpy.abs(grid).max() > 2.5:
        return ""
    positions = numpy.arange(len(grid))[:, None]
    for name, at_zero, inverse, wave in (
        ("cosines", 1.0, numpy.arccos, numpy.cos),
        ("sines", 0.0, numpy.arcsin, numpy.sin),
    ):
        scale = grid[0, 0] if at_zero else 1.0  # of long contexts
        if not scale or (numpy.abs(grid[0] - at_zero * scale) > 1e-3).any():
            continue
        unit = grid / scale
        angles = inverse(numpy.clip(unit[1], -1, 1))
        errors = numpy.minimum(
            numpy.abs(wave(positions * angles) - unit), numpy.abs(wave(positions * (numpy.pi - angles)) - unit)
        )[:8]
        if errors.max() < _CLOSE and numpy.ptp(grid[1]) > 0:
            return f"rotary {name}"
    return ""
