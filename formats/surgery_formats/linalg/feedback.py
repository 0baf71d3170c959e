# SPDX-License-Identifier: Apache-2.0
"""Rounding to a grid with error feedback along the inputs of a weight, as in GPTQ (Frantar et al. 2022, arXiv:2210.17323).

What is rounded first is made up for by what is rounded later, so that the error's second moment under H is small, not
the error of each value. GPTQ takes H from inputs. Here H is low-rank besides a diagonal, ``H = d I + R^T R`` with a few
directions R ``(r, n)``, and so is its recursion: with the error so far ``e = sum_j delta_j R_j`` (r numbers for each
output), the correction of the columns J that come next is ``-e M_J^-1 R_J`` with ``M_J = d I + sum_(k >= J) R_k R_k^T``.
That is GPTQ's own step (Woodbury), for ``4 r`` instead of ``n`` operations an element.

With R empty, H is a multiple of the identity, and nothing is better than rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy

from surgery_formats.arrays import Array, cast
from surgery_formats.dtypes import DType
from surgery_formats.threads import one_thread

__all__ = ["ErrorFeedback", "Nearest", "feedback", "leading_inputs", "round_columns", "round_rows", "step_width"]

_STEPS = 64
"""Steps that a row is rounded in, at least: within a step nothing makes up for anything."""
_WIDEST = 32  # columns of a step
_INDEPENDENT = 1e-3  # directions below this part of the largest are none: their factors were hardly trained

Nearest = Callable[[Array, int], tuple[Array, Array]]
"""``nearest(values, first)``: the codes of the nearest numbers, and these numbers."""


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """The directions in which errors shall vanish, ready for rounding.

    Attributes:
        directions: R, float32 ``(r, n)``.
        gains: ``M_J^-1 R_J`` of every step side by side, float32 ``(r, n)``.
        width: Columns of a step.
    """

    directions: Array
    gains: Array
    width: int


def step_width(inputs: int) -> int:
    """Inputs that are rounded together: a power of two, so that steps and blocks of scales begin together."""
    return min(_WIDEST, 1 << max(0, (inputs // _STEPS).bit_length() - 1))


def feedback(directions: Array, diagonal: float, width: int | None = None) -> ErrorFeedback:
    """The feedback for ``H = diagonal I + R^T R``.

    Args:
        directions: R, ``(r, n)``, finite.
        diagonal: Above 0: what errors outside of R weigh.
        width: Inputs that are rounded together; by default `step_width`.
    """
    rank, columns = directions.shape
    width = width or step_width(columns)
    exact = cast(directions, DType.F64)
    gains = numpy.empty_like(exact)
    moment = diagonal * numpy.eye(rank)
    with one_thread():
        for first in reversed(range(0, columns, width)):
            step = exact[:, first : first + width]
            moment += step @ step.T
            gains[:, first : first + width] = numpy.linalg.solve(moment, step)
    return ErrorFeedback(cast(exact, DType.F32), cast(gains, DType.F32), width)


def round_columns(values: Array, inputs: ErrorFeedback, nearest: Nearest) -> tuple[Array, Array]:
    """Round a block whose columns are the inputs.

    Args:
        values: float32 ``(m, n)``; never written to.
        inputs: Of the same `n`.
        nearest: Rounds ``(m, w)`` values of the columns from `first` on.

    Returns:
        The codes, and the numbers they stand for.
    """
    error = numpy.zeros((len(values), len(inputs.directions)), numpy.float32)
    codes, rounded = None, numpy.empty_like(values)
    for first in range(0, values.shape[1], inputs.width):
        step = slice(first, first + inputs.width)
        wanted = values[:, step]
        found, numbers = nearest(wanted - error @ inputs.gains[:, step], first)
        if codes is None:
            codes = numpy.empty(values.shape, found.dtype)
        codes[:, step], rounded[:, step] = found, numbers
        error += (numbers - wanted) @ inputs.directions[:, step].T
    return (rounded if codes is None else codes), rounded


def round_rows(values: Array, first: int, error: Array, inputs: ErrorFeedback, nearest: Nearest) -> tuple[Array, Array]:
    """Round a block whose rows are the inputs from `first` on, as `round_columns` does.

    Args:
        values: float32 ``(k, outputs)``; never written to.
        first: A multiple of the step, or of whatever the caller lets the last step be.
        error: ``(r, outputs)``, zeros before the first block; holds the error so far, and is brought up to date.
        inputs: Of all rows.
        nearest: Rounds ``(w, outputs)`` values of the rows from `first` of the block on.
    """
    codes, rounded = None, numpy.empty_like(values)
    for at in range(0, len(values), inputs.width):
        block, step = slice(at, at + inputs.width), slice(first + at, first + min(at + inputs.width, len(values)))
        wanted = values[block]
        found, numbers = nearest(wanted - inputs.gains[:, step].T @ error, at)
        if codes is None:
            codes = numpy.empty(values.shape, found.dtype)
        codes[block], rounded[block] = found, numbers
        error += inputs.directions[:, step] @ (numbers - wanted)
    return (rounded if codes is None else codes), rounded


def leading_inputs(factors: list[tuple[Array, Array]], most: int) -> Array:
    """An orthonormal basis ``(r, n)`` of the inputs that ``sum_i B_i A_i`` acts on: the rows of the ``A_i``.

    Args:
        factors: ``(B_i (m_i, r_i), A_i (r_i, n))``; the outputs of each may be others.
        most: Directions to keep: those that the update does most with.
    """
    with one_thread():
        acting = []
        for B, A in factors:
            upper = numpy.linalg.qr(cast(B, DType.F64), mode="r")
            acting.append(upper @ cast(A, DType.F64))
        _, sizes, basis = numpy.linalg.svd(numpy.concatenate(acting), full_matrices=False)
    kept = int((sizes > _INDEPENDENT * sizes[0]).sum()) if len(sizes) and sizes[0] > 0 else 0
    return basis[: min(kept, most)]
