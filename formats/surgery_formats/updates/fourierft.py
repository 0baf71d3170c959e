# SPDX-License-Identifier: Apache-2.0
"""FourierFT: ``W' = W + s Re F^-1(S)``, S zero but for a few frequencies (Gao et al. 2024, arXiv:2405.03003)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from surgery_formats.arrays import Array, array_of, cast, dtype_of, namespace
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.draws import TorchDraws

__all__ = ["FourierFT"]

_CHUNK = 256  # rows


@dataclass(frozen=True, slots=True)
class FourierFT:
    """Real coefficients of a two-dimensional Fourier transform, at frequencies that are drawn from a seed.

    Attributes:
        spectrum: ``(n,)``.
        seed: ``random_loc_seed``: the first n of all ``out * in`` places in a random order.
        scale: Factor on the addition.
        outputs: Rows of the weight; 0 until `fitted`.
        inputs: Its columns; 0 until `fitted`.
    """

    kind: ClassVar[str] = "FourierFT"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    spectrum: Factor
    seed: int
    scale: float
    outputs: int = 0
    inputs: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.outputs, self.inputs

    @property
    def held_numbers(self) -> int:
        """The rows of a chunk before and after their transform, the waves that meet in them, and one wave of either axis."""
        return 4 * _CHUNK * (self.inputs + self.spectrum.shape[0]) + 4 * max(self.shape)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The spectrum's."""
        return self.spectrum.tensors

    def scaled(self, weight: float) -> FourierFT:
        """The same frequencies, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def fitted(self, fit: Fit) -> FourierFT:
        """The sizes of the weight.

        Raises:
            FitError: it has fewer elements than there are frequencies.
        """
        stored, (out, inputs) = self.spectrum.tensors[0], fit.shape
        if self.spectrum.shape[0] > out * inputs:
            raise FitError(
                f"{self.spectrum.shape[0]} frequencies for a weight of {[out, inputs]}",
                file=stored.path,
                tensor=stored.name,
                hint="is this the base it was trained on?",
            )
        return replace(self, outputs=out, inputs=inputs)

    def factors(self) -> dict[str, Factor]:
        """``spectrum``."""
        return {"spectrum": self.spectrum}

    def low_rank(self) -> None:
        """None: every frequency has two directions of its own."""

    def parts(self) -> tuple[tuple[int, FourierFT], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Draw the places once; each block costs a transform of its rows, or of its columns if they are fewer, in float64.

        Along the other axis the few coefficients are summed instead, for the rows or columns that a block has.
        """
        out, inputs = self.shape
        spectrum = self.spectrum.load(DType.F64, weight.device) * self.scale
        places = _places(self.seed, out * inputs, self.spectrum.shape[0])
        by_rows = _Lines(spectrum, places // inputs, places % inputs, out, inputs)
        by_columns = _Lines(spectrum, places % inputs, places // inputs, inputs, out)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            if len(rows) * inputs <= len(cols) * out:
                return by_rows.add_to(block, rows, cols)
            return by_columns.add_to(block.T, cols, rows).T

        return apply


@lru_cache(maxsize=4)
def _places(seed: int, total: int, count: int) -> Array:
    """Kept, because layers of one shape share them, and of very large weights they take seconds."""
    return TorchDraws(seed).first_of_shuffled(total, count)


class _Lines:
    """Rows of the real part of the inverse transform of a sparse spectrum; its columns, where the axes are exchanged.

    A wave and the one that turns the other way have the same real part, so half of the frequencies along a line will do.
    """

    def __init__(self, spectrum: Array, across: Array, along: Array, lines: int, length: int) -> None:
        """Sort coefficients into layers, so that no two of a layer meet in a line.

        Args:
            spectrum: The coefficients, ``(n,)``.
            across: The frequency of each over the lines.
            along: The frequency of each along a line.
            lines: Number of lines.
            length: Of a line.
        """
        import numpy

        self._lines, self._length = lines, length
        turns = array_of(list(range(lines)), DType.F64, spectrum) * (2 * math.pi / lines)
        xp = namespace(spectrum)
        self._waves = (xp.cos(turns) + 1j * xp.sin(turns)) / lines
        half = numpy.minimum(along, length - along)
        across = numpy.where(along > half, -across, across)
        share = numpy.where((half == 0) | (2 * half == length), 1.0, 0.5)  # of a wave that has another turning its way
        order = numpy.argsort(half, kind="stable")
        starts = numpy.searchsorted(half[order], half[order])
        layer = numpy.arange(len(order)) - starts
        self._layers = [
            (
                spectrum[array_of(chosen, DType.I64, spectrum)] * array_of(share[chosen], DType.F64, spectrum),
                array_of(across[chosen], DType.I64, spectrum),
                array_of(half[chosen], DType.I64, spectrum),
            )
            for number in range(int(layer.max()) + 1)
            for chosen in [order[layer == number]]
        ]

    def add_to(self, block: Array, lines: Index, along: Index) -> Array:
        """Add the elements ``[lines, along]``."""
        for start in range(0, len(lines), _CHUNK):
            chunk = lines[start : start + _CHUNK]
            block[start : start + len(chunk)] += cast(positions(self._transformed(chunk), 1, along), dtype_of(block))
        return block

    def _transformed(self, lines: Index) -> Array:
        xp, length = namespace(self._waves), self._length
        shape = (len(lines), length // 2 + 1)
        values = xp.zeros(shape, dtype=xp.complex128, device=self._waves.device)
        numbers = array_of(list(lines), DType.I64, values)[:, None]
        for spectrum, across, half in self._layers:
            values[:, half] += spectrum * self._waves[numbers * across[None, :] % self._lines]
        for single in {0, length // 2} if length % 2 == 0 else {0}:
            values[:, single] = xp.real(values[:, single])  # what no other wave cancels
        return xp.fft.irfft(values, n=length, axis=1)
