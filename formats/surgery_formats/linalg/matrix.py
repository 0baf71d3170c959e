# SPDX-License-Identifier: Apache-2.0
"""Matrices that can be multiplied from both sides, in memory or read in blocks of rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy

from surgery_formats.arrays import Array, cast, dtype_of, empty, is_torch, namespace, to_device, wide
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.panel import squares

__all__ = ["SAFE", "MatrixSource", "Operator", "add_gram", "scale_of"]

_BLOCK = 1 << 23
"""Elements read from a source at a time: 32 MB of float32."""
_CACHED = 1 << 18
"""Elements of a block in memory that is passed over several times on the CPU, or converted for one product."""
SAFE = (1e-30, 1e30)
"""Squared norms that are normal numbers in float32, as are the squares of the elements."""


@runtime_checkable
class MatrixSource(Protocol):
    """A matrix that is not necessarily in memory."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        ...

    def rows(self, start: int, stop: int) -> Array:
        """Rows ``start:stop``, ``(stop - start, n)``, of a floating dtype, on any device; repeatable."""
        ...


def scale_of(norm2: float) -> float:
    """The power of two `s` with ``1 <= norm2 / s^2 < 4``."""
    return 2.0 ** math.floor(math.log2(norm2) / 2)


class Operator:
    """The matrix ``M``: `D`, transposed so that its rows are the short side, scaled to about ``1 <= ||M||_F < 2``.

    Attributes:
        shape: ``(m, n)`` of `D`.
        turned: Whether ``M = D^T / scale`` rather than ``D / scale``.
        scale: A power of two, so that scaling is exact; without it the squares of small deltas underflow.
        norm2: ``||M||_F^2``, summed in float64; 0 for a matrix of zeros.
        dtype: Type of the products, float32 or float64.
        like: An array of the library, and on the device, that the products are computed with.
    """

    def __init__(self, matrix: Array | MatrixSource, device: str | None = None, total: float | None = None) -> None:
        m, n = matrix.shape
        self.shape = (int(m), int(n))
        self.turned = m > n
        self.short, self.long = min(self.shape), max(self.shape)
        self._matrix: Array = matrix
        self._source, self._device = isinstance(matrix, MatrixSource), device or "cpu"
        if self._source:
            self.dtype, self.like = DType.F32, empty((0,), DType.F32, self._device)
        else:
            self.dtype = wide(dtype_of(matrix))
            self._matrix = cast(matrix, self.dtype) if device is None else to_device(matrix, device, self.dtype)
            self.like = self._matrix[:0]
        self.scale = 1.0
        norm2 = total**2 if total is not None and SAFE[0] < total**2 < SAFE[1] else self._norm2()
        if norm2 > 0:
            self.scale = scale_of(norm2)
            if not 1e-30 < self.scale < 1e30:
                self.dtype = DType.F64
        self.norm2 = norm2 / self.scale / self.scale

    def in_float64(self) -> Operator:
        """Return the same matrix, with the same scale, with products in float64.

        A scale of its own could differ where the norm is so near a power of two that rounding decides, and results of
        the two operators are mixed.
        """
        operator = copy.copy(self)
        operator.dtype = DType.F64
        operator.norm2 = operator._norm2() / self.scale / self.scale
        return operator

    def blocks(self) -> Iterator[tuple[int, int, Array]]:
        """Yield ``(start, stop, rows start:stop of D)``, unscaled; one block if unconverted."""
        held = not self._source and dtype_of(self._matrix) is self.dtype
        in_cache = not self._source and not is_torch(self.like)
        return self._blocks(self.dtype, self.shape[0] if held else self._step(_CACHED if in_cache else _BLOCK))

    def _blocks(self, dtype: DType | None, step: int, first: int = 0) -> Iterator[tuple[int, int, Array]]:
        """Yield `step` rows at a time, from row `first`; as they are stored if `dtype` is None."""
        for start in range(first, self.shape[0], step):
            stop = min(self.shape[0], start + step)
            rows = self._matrix.rows(start, stop) if self._source else self._matrix[start:stop]
            yield start, stop, rows if dtype is None else self._here(rows, dtype)

    def _here(self, rows: Array, dtype: DType) -> Array:
        return to_device(rows, self._device, dtype) if self._source else cast(rows, dtype)

    def _step(self, elements: int) -> int:
        """Number of rows with about as many elements."""
        return max(1, elements // max(1, self.shape[1]))

    def times(self, rows: Array) -> Array:
        """``(M x)^T``, ``(b, short)``, for vectors ``x^T`` as `rows`, ``(b, long)``."""
        return self._adjoint(rows) if self.turned else self._forward(rows)

    def adjoint(self, rows: Array) -> Array:
        """``(M^T y)^T``, ``(b, long)``, for vectors ``y^T`` as `rows`, ``(b, short)``."""
        return self._forward(rows) if self.turned else self._adjoint(rows)

    def gram(self) -> Array:
        """``M M^T``, ``(short, short)``, float64; one pass if rows are the long side."""
        xp, step = namespace(self.like), self._step(_BLOCK)
        gram = xp.zeros((self.short, self.short), dtype=xp.float64, device=self.like.device)
        for start, stop, rows in self._blocks(DType.F64, step):
            rows = rows / self.scale
            if self.turned:
                add_gram(gram, rows)
                continue
            for begin, end, others in self._blocks(DType.F64, step, start):
                part = rows @ (others / self.scale).T if begin > start else rows @ rows.T
                gram[start:stop, begin:end] = part
                gram[begin:end, start:stop] = part.T
        return gram

    def left_over(self, left: Array, right: Array, dtype: DType) -> Array:
        """Squared norm of every row of ``D / scale - left right``, ``(m,)``, float64, with each element formed in `dtype`.

        `left` is ``(m, r)``, `right` ``(r, n)``.
        """
        left, right = cast(left, dtype), cast(right, dtype)
        step = self.shape[0] if is_torch(self.like) else self._step(_CACHED)
        norms = []
        for start, stop, rows in self._blocks(None, self._step(_BLOCK) if self._source else self.shape[0]):
            for at in range(start, stop, step):
                rest = self._here(rows[at - start : at - start + step], dtype) / self.scale
                rest -= left[at : min(at + step, stop)] @ right
                norms.append(cast(squares(rest), DType.F64))
        return namespace(left).concat(norms)

    def change_of_energy(self, left: Array, right: Array) -> Array:
        """`left_over` minus ``||row of D / scale||^2``, from one product; ``(m,)``, float64; same arguments."""
        left, right = cast(left, self.dtype), cast(right, self.dtype)
        product = cast(self._forward(right).T, DType.F64)
        exact, other = cast(left, DType.F64), cast(right, DType.F64)
        return namespace(left).sum(exact * (exact @ (other @ other.T) - 2 * product), axis=1)

    def _forward(self, rows: Array) -> Array:
        scaled = rows / self.scale
        parts = [scaled @ block.mT for _, _, block in self.blocks()]
        return parts[0] if len(parts) == 1 else namespace(rows).concat(parts, axis=-1)

    def _adjoint(self, rows: Array) -> Array:
        scaled, result = rows / self.scale, None
        for start, stop, block in self.blocks():
            part = scaled[..., start:stop] @ block
            if result is None:
                result = part
            else:
                result += part
        return result

    def _norm2(self) -> float:
        total = 0.0
        for _, _, rows in self.blocks():
            largest, energy = _largest_and_sum(rows)
            if not SAFE[0] < largest < SAFE[1]:  # also true for NaN
                largest, energy = _largest_and_sum(cast(rows, DType.F64))
                if not math.isfinite(energy) and not bool(namespace(rows).all(namespace(rows).isfinite(rows))):
                    raise FitError("the matrix contains NaN or infinity", hint="such a difference has no factors")
            total += energy
        if not math.isfinite(total) or 0 < total < 1e-250:
            raise FitError(f"the matrix's norm, {math.sqrt(total):g}, is out of range")
        return total


def add_gram(gram: Array, rows: Array) -> None:
    """Add ``rows^T rows`` to `gram`, ``(n, n)``, some rows at a time: the product of wide `rows` is not held twice."""
    n = rows.shape[1]
    step = max(1, _BLOCK // max(1, n))
    for at in range(0, n, step):
        gram[at : at + step] += rows[:, at : at + step].T @ rows


def _largest_and_sum(rows: Array) -> tuple[float, float]:
    """Of the squared norms of the rows, which may overflow or vanish."""
    xp = namespace(rows)
    if 0 in rows.shape:
        return 0.0, 0.0
    with numpy.errstate(over="ignore"):
        norms = cast(squares(rows), DType.F64)
    largest, energy = xp.stack([xp.max(norms), xp.sum(norms)]).tolist()
    return largest, energy
