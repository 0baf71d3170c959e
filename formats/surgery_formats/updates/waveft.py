# SPDX-License-Identifier: Apache-2.0
"""WaveFT: ``W' = W + s IDWT(S)``, S zero but for a few coefficients of a wavelet transform (Bilican et al. 2025, arXiv:2505.12532)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, array_of, assign, empty, namespace, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.draws import TorchDraws
from surgery_formats.updates.sparse import adding_at
from surgery_formats.updates.wavelets import LOWPASS, highpass

__all__ = ["WaveFT"]

_ELEMENTS = 1 << 18  # of the transform along the columns, summed in float64 at once


@dataclass(frozen=True, slots=True)
class WaveFT:
    """Trained coefficients at random places of one level of a wavelet transform.

    Attributes:
        values: ``waveft_spectrum``, ``(n,)``.
        seed: Of the places, the first n of all elements shuffled as torch shuffles them.
        wavelet: Name of the filters; empty where the coefficients are elements of the weight itself.
        scale: Factor on the addition.
        outputs: Rows of the weight; 0 until `fitted`.
        inputs: Its columns; 0 until `fitted`.
    """

    kind: ClassVar[str] = "WaveFT"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    values: Factor
    seed: int
    wavelet: str
    scale: float
    outputs: int = 0
    inputs: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.outputs, self.inputs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The values'."""
        return self.values.tensors

    @property
    def held_numbers(self) -> int:
        """The coefficients, transformed along one axis, and what of them is summed at once."""
        return (self.outputs + 64) * self.inputs + max(_ELEMENTS, self.inputs) if self.wavelet else 0

    def scaled(self, weight: float) -> WaveFT:
        """The same coefficients, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def fitted(self, fit: Fit) -> WaveFT:
        """The sizes of the weight.

        Raises:
            FitError: it has fewer elements than there are coefficients.
        """
        if self.values.shape[0] > fit.shape[0] * fit.shape[1]:
            raise FitError(
                f"{self.values.shape[0]} coefficients for a weight of {list(fit.shape)}",
                file=self.tensors[0].path,
                tensor=self.tensors[0].name,
                hint="is this the base it was trained on?",
            )
        return replace(self, outputs=fit.shape[0], inputs=fit.shape[1])

    def factors(self) -> dict[str, Factor]:
        """``values``."""
        return {"values": self.values}

    def low_rank(self) -> None:
        """None: what is sparse has no low rank."""

    def parts(self) -> tuple[tuple[int, WaveFT], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Transform the coefficients along the columns once; along the rows, block by block."""
        places = TorchDraws(self.seed).first_of_shuffled(self.outputs * self.inputs, self.values.shape[0])
        rows, cols = places // self.inputs, places % self.inputs
        if not self.wavelet:
            return adding_at(rows, cols, self.values.load(weight.dtype, weight.device) * self.scale)
        values = to_cpu(self.values.load(DType.F64)) * self.scale
        low = LOWPASS[self.wavelet]
        half, held = self._along_columns(rows, cols, values, low, weight)
        filters = low, highpass(low)

        def apply(block: Array, at: Index, beside: Index) -> Array:
            import numpy

            xp = namespace(block)
            behind = numpy.asarray(at, numpy.int64) + len(low) - 2  # of a transform that was not cut yet
            for part, lowest in zip(filters, (0, half), strict=True):
                for tap in range(0, len(low), 2):
                    coefficient, odd = behind // 2 - tap // 2, behind % 2
                    gain = numpy.asarray(part)[tap + odd] * ((coefficient >= 0) & (coefficient < half))
                    found = array_of(lowest + coefficient.clip(0, half - 1), DType.I64, block)
                    taken = xp.take(positions(held, 1, beside), found, axis=0)
                    block += taken * array_of(gain, weight.dtype, block)[:, None]
            return block

        return apply

    def _along_columns(
        self, rows: Array, cols: Array, values: Array, low: tuple[float, ...], weight: Weight
    ) -> tuple[int, Array]:
        """``(coefficients per half, the two halves transformed along the columns)``, one under the other.

        PEFT takes the quarters top right and bottom left in each other's place: coefficients of the right half get the
        highpass along the rows, those of the lower half along the columns. The upper half of the result is what gets the
        lowpass along the rows.

        Args:
            rows: Of the coefficients, ``(n,)``.
            cols: As `rows`.
            values: As `rows`, float64.
            low: The lowpass.
            weight: Whose type and device the result has.
        """
        import numpy

        (height, row_at), (width, col_at) = (_padded(size, len(low)) for size in self.shape)
        rows, cols = rows + row_at, cols + col_at
        right, lower = cols >= width // 2, rows >= height // 2
        to, first = rows % (height // 2) + height // 2 * right, 2 * (cols % (width // 2)) - len(low) + 2
        gains = numpy.asarray((low, highpass(low)))[lower.astype(int)]
        across = empty((height, self.inputs), weight.dtype, weight.device)
        step = max(1, _ELEMENTS // self.inputs)
        for start in range(0, height, step):  # all of it in float64 would be twice the memory
            some = numpy.flatnonzero((to >= start) & (to < start + step))
            summed = numpy.zeros((min(step, height - start), self.inputs))
            for tap in range(len(low)):
                inside = some[(first[some] + tap >= 0) & (first[some] + tap < self.inputs)]
                numpy.add.at(summed, (to[inside] - start, first[inside] + tap), values[inside] * gains[inside, tap])
            assign(across[start : start + step], summed)
        return height // 2, across


def _padded(size: int, taps: int) -> tuple[int, int]:
    """``(even size of the transform, where the weight's own coefficients begin)``: the ends lose ``taps - 2``."""
    padded = size + taps - 2 + (size + taps) % 2
    return padded, (padded - size) // 2
