# SPDX-License-Identifier: Apache-2.0
"""Matrices that can be multiplied from both sides, in memory or read in blocks of rows."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Protocol

import torch

from surgery_formats.errors import FitError

__all__ = ["MatrixSource", "Operator", "one_thread"]

_BLOCK = 1 << 23
"""Elements read from a source at a time: 32 MB of float32."""
_SAFE = (1e-15, 1e15)
"""Norms whose squares, and those of the elements, are normal numbers in float32."""


class MatrixSource(Protocol):
    """A matrix that is not necessarily in memory."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop``, ``(stop - start, n)``, of a floating dtype, on any device; repeatable."""
        ...


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit this thread to one core: QR and gemm round differently when split over different numbers of threads."""
    if (before := torch.get_num_threads()) == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Operator:
    """The matrix ``M``: `D`, transposed so that its rows are the short side, scaled to about ``1 <= ||M||_F < 2``.

    Attributes:
        shape: ``(m, n)`` of `D`.
        turned: Whether ``M = D^T / scale`` rather than ``D / scale``.
        scale: A power of two, so that scaling is exact; without it the squares of small deltas underflow.
        norm2: ``||M||_F^2``, summed in float64; 0 for a matrix of zeros.
        dtype: Type of the products, float32 or float64.
        device: Where the products are computed.
    """

    def __init__(
        self,
        matrix: torch.Tensor | MatrixSource,
        device: torch.device | None,
        dtype: torch.dtype | None,
        total: float | None = None,
    ) -> None:
        m, n = matrix.shape
        self.shape = (int(m), int(n))
        self.turned = m > n
        self.short, self.long = min(self.shape), max(self.shape)
        self._matrix = matrix
        if isinstance(matrix, torch.Tensor):
            self.device = device or matrix.device
            self.dtype = dtype or (torch.float64 if matrix.dtype == torch.float64 else torch.float32)
            stored = matrix if matrix.dtype == torch.float64 else matrix.float()
            self._matrix = stored.to(self.device)
        else:
            self.device = device or torch.device("cpu")
            self.dtype = dtype or torch.float32
        self.scale = 1.0
        norm2 = total**2 if total is not None and _SAFE[0] < total < _SAFE[1] else self._norm2()
        if norm2 > 0:
            self.scale = 2.0 ** math.floor(math.log2(norm2) / 2)
            if not 1e-30 < self.scale < 1e30:
                self.dtype = torch.float64
        self.norm2 = norm2 / self.scale / self.scale

    def in_float64(self) -> Operator:
        """Return the same matrix, with the same scale, with products in float64.

        A scale of its own could differ where the norm is so near a power of two that rounding decides, and results of
        the two operators are mixed.
        """
        operator = copy.copy(self)
        operator.dtype = torch.float64
        operator.norm2 = operator._norm2() / self.scale / self.scale
        return operator

    def blocks(self, dtype: torch.dtype | None = None, first: int = 0) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield ``(start, stop, rows start:stop of D)`` from row `first`, unscaled; one block if unconverted."""
        m, n = self.shape
        dtype = dtype or self.dtype
        in_memory = isinstance(self._matrix, torch.Tensor) and self._matrix.dtype == dtype
        step = m if in_memory else max(1, _BLOCK // max(1, n))
        for start in range(first, m, step):
            stop = min(m, start + step)
            block = (
                self._matrix[start:stop] if isinstance(self._matrix, torch.Tensor) else self._matrix.rows(start, stop)
            )
            yield start, stop, block.to(self.device, dtype)

    def times(self, rows: torch.Tensor) -> torch.Tensor:
        """``(M x)^T``, ``(b, short)``, for vectors ``x^T`` as `rows`, ``(b, long)``."""
        return self._adjoint(rows) if self.turned else self._forward(rows)

    def adjoint(self, rows: torch.Tensor) -> torch.Tensor:
        """``(M^T y)^T``, ``(b, long)``, for vectors ``y^T`` as `rows`, ``(b, short)``."""
        return self._forward(rows) if self.turned else self._adjoint(rows)

    def gram(self) -> torch.Tensor:
        """``M M^T``, ``(short, short)``, float64; one pass if rows are the long side."""
        gram = torch.zeros(self.short, self.short, dtype=torch.float64, device=self.device)
        for start, stop, rows in self.blocks(torch.float64):
            rows = rows / self.scale
            if self.turned:
                gram.addmm_(rows.T, rows)
                continue
            for begin, end, others in self.blocks(torch.float64, start):
                part = rows @ (others / self.scale).T
                gram[start:stop, begin:end] = part
                gram[begin:end, start:stop] = part.T
        return gram

    def left_over(self, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Squared norm of every row of ``D / scale - left right``, ``(m,)``, float64, with each element formed in `dtype`.

        `left` is ``(m, r)``, `right` ``(r, n)``.
        """
        left, right = left.to(dtype), right.to(dtype)
        step = max(1, _BLOCK // max(1, self.shape[1])) if self.device.type == "cpu" else self.shape[0]
        norms = []
        for start, _, rows in self.blocks(dtype):
            for offset in range(0, len(rows), step):
                part = rows[offset : offset + step]
                rest = torch.addmm(
                    part, left[start + offset : start + offset + len(part)], right, beta=1 / self.scale, alpha=-1
                )
                norms.append(_row_norms(rest).double().square())
        return torch.cat(norms)

    def change_of_energy(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`left_over` minus ``||row of D / scale||^2``, from one product; ``(m,)``, float64; same arguments."""
        left, right = left.to(self.dtype), right.to(self.dtype)
        product = self._forward(right).T.double()
        wide, exact = left.double(), right.double()
        return (wide * (wide @ (exact @ exact.T) - 2 * product)).sum(1)

    def _forward(self, rows: torch.Tensor) -> torch.Tensor:
        result = rows.new_empty(self.shape[0], rows.shape[0])
        columns = (rows / self.scale).T
        for start, stop, block in self.blocks():
            torch.mm(block, columns, out=result[start:stop])
        return result.T

    def _adjoint(self, rows: torch.Tensor) -> torch.Tensor:
        scaled, result = rows / self.scale, None
        for start, stop, block in self.blocks():
            part = scaled[:, start:stop]
            result = torch.mm(part, block) if result is None else result.addmm_(part, block)
        assert result is not None
        return result

    def _norm2(self) -> float:
        total = 0.0
        for _, _, rows in self.blocks():
            norms = _row_norms(rows)
            largest, energy = torch.stack([norms.max().double(), norms.double().square().sum()]).tolist()
            if not _SAFE[0] < largest < _SAFE[1]:  # also true for NaN
                norms = _row_norms(rows, torch.float64)
                energy = float(norms.square().sum())
                if not math.isfinite(energy) and not bool(torch.isfinite(norms).all()):
                    raise FitError("the matrix contains NaN or infinity", hint="such a difference has no factors")
            total += energy
        if not math.isfinite(total) or 0 < total < 1e-250:
            raise FitError(f"the matrix's norm, {math.sqrt(total):g}, is out of range")
        return total


def _row_norms(rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=dtype) if rows.numel() else rows.new_zeros(1)
