# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints side by side: which tensors belong together, whether they differ, and by how much.

Nothing is kept in memory: a difference is read by row blocks whenever it is asked for. Subtraction is done in float32, in float64 where a
side is stored so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from surgery.pairs import Pair
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.lenses import Plain

if TYPE_CHECKING:
    import torch

__all__ = ["BLOCK_ELEMENTS", "Delta", "Measure", "Strip", "measure"]

BLOCK_ELEMENTS = 1 << 19
"""Elements per block, 2 MB of float32. Fixed, so that sums depend on nothing else."""
_SAMPLE = 8  # of a tensor of several blocks one row of eight is looked at for the figures about rounding
_EXPONENTS = 2200  # powers of two that float64 knows


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

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """``(first row, block)`` over the whole, in storage order."""
        rows, cols = self.stored_shape
        height = max(1, BLOCK_ELEMENTS // max(cols, 1))
        for start in range(0, rows, height):
            yield start, self.rows(start, min(start + height, rows))

    def whole(self, device: str = "cpu") -> torch.Tensor:
        """The logical matrix in one piece."""
        import torch

        made = torch.empty(self.stored_shape, dtype=self.dtype)
        for start, block in self.blocks():
            made[start : start + len(block)] = block
        return (made.T.contiguous() if self.transposed else made).to(device)


def _subtract(strip: Strip, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    import torch

    tuned = strip.tuned.get(start, stop, dtype)
    found = tuned.sub_(strip.base.get(start, stop, dtype))
    if found.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(found))).all()):
        for side in (strip.base, strip.tuned):
            if not bool(torch.isfinite(side.get(start, stop, dtype)).all()):
                raise FitError("holds NaN or Inf", file=side.tensor.file.path, tensor=side.tensor.name)
        raise FitError(
            "the difference overflows float32", file=strip.tuned.tensor.file.path, tensor=strip.tuned.tensor.name
        )
    return found


@dataclass(frozen=True, slots=True)
class Measure:
    """What was found out about one pair, over the rows both sides have.

    Attributes:
        changed: Whether any value differs.
        energy: ``||D||_F^2``.
        rows: Numbers of the rows that differ; empty where more than `row_limit` do, or where they were not asked for.
        changed_rows: How many rows differ; of a tensor whose rows were not asked for, how many blocks.
        sampled: Values looked at for the following.
        moved: How many of them differ.
        sampled_energy: Of those values.
        ulp: Median of TUNED's spacing.
        noise: Expected energy of storage rounding, ``sum ulp^2 / 12`` per rounded side, over all values.
    """

    changed: bool
    energy: float = 0.0
    rows: tuple[int, ...] = ()
    changed_rows: int = 0
    sampled: int = 0
    moved: int = 0
    sampled_energy: float = 0.0
    ulp: float = 0.0
    noise: float = 0.0

    @property
    def rms_ulp(self) -> float:
        """Root mean square of the change in units of TUNED's median spacing."""
        return math.sqrt(self.sampled_energy / self.sampled) / self.ulp if self.sampled and self.ulp else 0.0

    @property
    def moved_share(self) -> float:
        """Share of values that differ."""
        return self.moved / self.sampled if self.sampled else 0.0


def measure(pair: Pair, row_limit: int = 0) -> Measure:
    """Compare a pair, block by block.

    Args:
        pair: Of equal shapes, or grown (the common rows are compared).
        row_limit: Most rows to name.

    Raises:
        FitError: NaN or Inf on one side.
    """
    import torch

    from surgery_formats.linalg.noise import spacing

    base, tuned = Plain.of(pair.base), Plain.of(pair.tuned)
    rows, cols = min(base.shape[0], tuned.shape[0]), tuned.shape[1]
    height = max(1, BLOCK_ELEMENTS // max(cols, 1))
    step = _SAMPLE if rows > height else 1
    energy = sampled_energy = noise = 0.0
    exponents = torch.zeros(_EXPONENTS, dtype=torch.int64)
    sampled = moved = changed_rows = 0
    named: list[int] = []
    numbers = pair.tuned.dtype.is_float and pair.base.dtype.is_float
    exact = torch.float64 if DType.F64 in (pair.base.dtype, pair.tuned.dtype) else torch.float32
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        one, other = base.stored(start, stop), tuned.stored(start, stop)
        if one.dtype == other.dtype and torch.equal(one.view(_bits(one)), other.view(_bits(other))):
            if numbers and not bool(torch.isfinite(other).all()):
                raise FitError("holds NaN or Inf", file=pair.tuned.file.path, tensor=pair.tuned.name)
            sampled += one[::step].numel()
            continue
        if not numbers:
            changed_rows += stop - start
            continue
        delta = _subtract(Strip(base, tuned, 0, rows), start, stop, exact)
        if row_limit:
            hit = torch.nonzero((delta != 0).any(dim=1)).flatten()
            changed_rows += len(hit)
            named += (hit + start).tolist() if changed_rows <= row_limit else []
        else:
            changed_rows += int(bool(torch.count_nonzero(delta)))
        energy += float(delta.square().sum(dtype=torch.float64))
        part = delta[::step]
        units = spacing(other[::step].to(exact), pair.tuned.dtype)
        sampled += part.numel()
        moved += int(torch.count_nonzero(part))
        sampled_energy += float(part.square().sum(dtype=torch.float64))
        exponents += _exponents(units)
        noise += float(units.square().sum(dtype=torch.float64)) / 12
    if pair.grown > 0:
        _check_rows(tuned, rows)
    return Measure(
        changed_rows > 0 or pair.grown > 0,
        energy,
        tuple(named) if changed_rows <= row_limit else (),
        changed_rows,
        sampled,
        moved,
        sampled_energy,
        _median(exponents),
        noise * (rows * cols / sampled if sampled else 1.0),
    )


def _check_rows(tuned: Plain, start: int) -> None:
    """The rows that only TUNED has are numbers."""
    import torch

    if not bool(torch.isfinite(tuned.get(start, tuned.shape[0])).all()):
        raise FitError("holds NaN or Inf", file=tuned.tensor.file.path, tensor=tuned.tensor.name)


def _exponents(powers: torch.Tensor) -> torch.Tensor:
    """How often each power of two occurs."""
    import torch

    found = torch.frexp(powers.flatten()).exponent.long() + _EXPONENTS // 2
    return torch.bincount(found.clamp_(0, _EXPONENTS - 1), minlength=_EXPONENTS)


def _median(exponents: torch.Tensor) -> float:
    """The power of two in the middle; 0 if there are none."""
    total = int(exponents.sum())
    middle = int((exponents.cumsum(0) * 2 < total).sum())
    return math.ldexp(0.5, middle - _EXPONENTS // 2) if total else 0.0


def _bits(values: torch.Tensor) -> torch.dtype:
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
