# SPDX-License-Identifier: Apache-2.0
"""DoRA: ``W' = m / ||V|| * V`` with ``V = W + s B A`` (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, cast, namespace
from surgery_formats.dtypes import DType
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Weight
from surgery_formats.updates.lora import LoRA
from surgery_formats.updates.spectrum import all_blocks

__all__ = ["DoRA"]


@dataclass(frozen=True, slots=True)
class DoRA:
    """A low-rank addition whose result is given new row (or column) lengths.

    Attributes:
        direction: The low-rank part.
        magnitude: ``m``: one value per logical row, ``(out,)``, or per logical column, ``(in,)``. A convolution has one
            per input channel, so that the ``k`` columns of a channel share a value and a norm.
        per_row: Whether `magnitude` belongs to rows (PEFT linear and convolution) or columns (PEFT embeddings,
            input-axis LyCORIS files).
    """

    kind: ClassVar[str] = "DoRA"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "maps"
    of_base: ClassVar[bool] = True

    direction: LoRA
    magnitude: Factor
    per_row: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.direction.shape

    @property
    def rank(self) -> int:
        """Inner size of the low-rank part."""
        return self.direction.rank

    @property
    def alpha(self) -> float | None:
        """As written in the file."""
        return self.direction.alpha

    @property
    def scale(self) -> float:
        """On the low-rank part, before rows get their lengths."""
        return self.direction.scale

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The low-rank part's, then the magnitude's."""
        return (*self.direction.tensors, *self.magnitude.tensors)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """What the scale of the direction was read from."""
        return self.direction.untrained

    def factors(self) -> dict[str, Factor]:
        """Those of the direction, and ``magnitude``."""
        return {**self.direction.factors(), "magnitude": self.magnitude}

    def low_rank(self) -> None:
        """None: the lengths of its rows depend on the weight."""

    def rebuilt(self, direction: LoRA, magnitude: Factor) -> DoRA:
        """A DoRA of the same axis with these parts."""
        return replace(self, direction=direction, magnitude=magnitude)

    def parts(self) -> tuple[tuple[int, DoRA], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """One pass over the weight for the norms of V (accumulated in float64), then row blocks."""
        add = self.direction.prepare(weight)
        gain = cast(self._gain(self.lost(weight), weight), weight.dtype)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            v = add(block, rows, cols)
            v *= self._along(gain, rows, cols)
            return v

        return apply

    def lost(self, weight: Weight) -> Array:
        """The lengths of V, in float64: the result has the trained ones instead.

        Rows that a part of a fused weight has before its own count as zeros. Columns need all rows.

        Raises:
            FitError: lengths of columns, of a weight whose rows the base holds in several tensors.
        """
        add = self.direction.prepare(weight)
        magnitude = self.magnitude.load(DType.F64, weight.device)
        xp = namespace(magnitude)
        squares = xp.zeros(weight.shape[0 if self.per_row else 1], dtype=xp.float64, device=magnitude.device)
        blocks = weight.blocks() if self.per_row else all_blocks(weight, self.shape, self.magnitude.tensors[0])
        for block, rows, cols in blocks:
            v = add(block, rows, cols)
            v *= v
            sums = xp.sum(v, axis=1 if self.per_row else 0, dtype=xp.float64)
            at = rows if self.per_row else cols
            squares[slice(at.start, at.stop, at.step) if isinstance(at, range) else list(at)] += sums
        shared = 1 if self.per_row else len(squares) // len(magnitude)  # columns of one input channel
        return xp.sqrt(xp.sum(squares.reshape(-1, shared), axis=1))

    def inverse(self, weight: Weight, share: float, lost: Array | None) -> Apply:
        """``W = (W' - w g s B A) / (1 - w + w g)`` with the gains ``g = m / ||V||``.

        Raises:
            ValueError: without the lengths of V.
        """
        if lost is None:
            raise ValueError("the lengths of the rows are not in the result")
        gain = cast(self._gain(lost, weight), weight.dtype) * share
        add = self.direction.prepare(weight)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            delta = add(namespace(block).zeros_like(block), rows, cols)
            along = self._along(gain, rows, cols)
            block -= delta * along
            block /= along + (1 - share)
            return block

        return apply

    def _gain(self, lengths: Array, weight: Weight) -> Array:
        """``m / ||V||`` of every row or column, in float64."""
        magnitude = self.magnitude.load(DType.F64, weight.device)
        if self.per_row:  # a part of a fused weight may end before the others; what lies before it is not looked at
            return magnitude[: weight.shape[0]] / lengths
        return namespace(magnitude).repeat(magnitude / lengths, weight.shape[1] // len(magnitude))

    def _along(self, gain: Array, rows: Index, cols: Index) -> Array:
        """The gains of a block, of a shape that multiplies it."""
        return positions(gain, 0, rows)[:, None] if self.per_row else positions(gain, 0, cols)[None, :]
