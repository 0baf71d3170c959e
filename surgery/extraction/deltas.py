# SPDX-License-Identifier: Apache-2.0
"""A difference of two checkpoints as a matrix.

Nothing is kept in memory: it is read by row blocks whenever it is asked for. Subtraction is done in float32, in float64 where a
side is stored so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.storage.plain import Plain

if TYPE_CHECKING:
    import torch

__all__ = ["BLOCK_ELEMENTS", "Delta", "StoredDelta", "Strip"]

BLOCK_ELEMENTS = 1 << 19
"""Elements per block, 2 MB of float32. Fixed, so that sums depend on nothing else."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Rows ``[first, last)`` of a pair, seen as matrices ``(rows, cols)``."""

    base: Plain
    tuned: Plain
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Delta:
    """TUNED minus BASE as one logical matrix ``(out, in)``, made of strips one under the other.

    Attributes:
        strips: In order.
        transposed: The stored matrices are ``(in, out)``; then there is one strip.
        dtype: Precision of the subtraction.
    """

    strips: tuple[Strip, ...]
    transposed: bool = False
    names: tuple[str, ...] = field(default=())

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows of all strips, columns."""
        return sum(strip.last - strip.first for strip in self.strips), self.strips[0].tuned.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        rows, cols = self.stored_shape
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def dtype(self) -> torch.dtype:
        """float64 where a side is stored so, else float32."""
        import torch

        wide = any(side.tensor.dtype is DType.F64 for strip in self.strips for side in (strip.base, strip.tuned))
        return torch.float64 if wide else torch.float32

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Stored rows ``[start, stop)`` of the difference, ``(stop - start, cols)``.

        Raises:
            FitError: NaN or Inf on one side.
        """
        import torch

        parts, at = [], 0
        for strip in self.strips:
            height = strip.last - strip.first
            low, high = max(start - at, 0), min(stop - at, height)
            if low < high:
                parts.append(_subtract(strip, strip.first + low, strip.first + high, self.dtype))
            at += height
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def whole(self) -> torch.Tensor:
        """The logical matrix in one piece, read now."""
        made = self.rows(0, self.stored_shape[0])
        return made.T.contiguous() if self.transposed else made

    @property
    def stored(self) -> StoredDelta:
        """As the files have it."""
        return StoredDelta(self)

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class StoredDelta:
    """A difference in the orientation of its files, read again at every use (`surgery_formats.linalg.matrix.MatrixSource`)."""

    delta: Delta

    @property
    def shape(self) -> tuple[int, int]:
        """Stored rows, columns."""
        return self.delta.stored_shape

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """See `Delta.rows`."""
        return self.delta.rows(start, stop)


def _subtract(strip: Strip, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    import torch

    tuned = strip.tuned.get(start, stop, dtype)
    found = tuned.sub_(strip.base.get(start, stop, dtype))
    if found.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(found))).all()):
        for side in (strip.base, strip.tuned):
            if not bool(torch.isfinite(side.get(start, stop, dtype)).all()):
                raise FitError("holds NaN or Inf", file=side.tensor.path, tensor=side.tensor.name)
        raise FitError(
            "values or differences too large: their squares overflow float32",
            file=strip.tuned.tensor.path,
            tensor=strip.tuned.tensor.name,
        )
    return found
