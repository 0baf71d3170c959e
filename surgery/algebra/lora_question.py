# SPDX-License-Identifier: Apache-2.0
"""What a rank would cost where changes have no low rank: the question to the user, and its answer by the spectrum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError
from surgery_formats.text import show

__all__ = ["ChangeSpectrum", "no_low_rank"]

_RANKS = (4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class ChangeSpectrum:
    """The leading singular values of a change.

    Attributes:
        site: Of the weight.
        kind: What makes the change.
        values: Descending.
        norm: ``||change||_F``.
        full: The most directions that a matrix of its shape can have.
    """

    site: str
    kind: str
    values: Array
    norm: float
    full: int

    def left(self, rank: int) -> float:
        """Square of what the best factors of `rank` leave out."""
        return max(self.norm**2 - float((self.values[:rank] ** 2).sum()), 0.0)


def no_low_rank(spectra: Sequence[ChangeSpectrum], weights: int, adapter: Adapter) -> FitError:
    """The refusal: which weight has no low rank, what each rank would lose, and where the spectrum bends.

    `spectra` are those of the weights that were measured, `weights` how many the adapter changes.
    """
    first = spectra[0]
    known = min(len(spectrum.values) for spectrum in spectra)
    total = math.fsum(spectrum.norm**2 for spectrum in spectra)
    lost = [math.sqrt(math.fsum(s.left(rank) for s in spectra) / total) for rank in range(known + 1)]
    shown = [rank for rank in _RANKS if rank < known] + [known]
    costs = ", ".join(f"rank {rank} {lost[rank]:.1%}" for rank in shown)
    knee = _knee(lost)
    return FitError(
        f"what {show(first.kind)} makes of '{show(first.site)}' has no low rank ({first.full} directions, all in use); "
        f"over {len(spectra)} of {weights} weights the best LoRA misses: {costs} of the change; the knee of the spectrum "
        f"is at rank {knee}",
        file=adapter.path,
        hint=f"choose `rank={knee}`, an energy or a greatest error, or merge it into the base",
    )


def _knee(lost: Sequence[float]) -> int:
    """The rank at which the curve of the errors lies furthest below the line between its ends, at least 1."""
    if len(lost) < 3:
        return len(lost) - 1
    line = numpy.linspace(lost[0], lost[-1], len(lost))
    return max(1, int(numpy.argmax(line - numpy.asarray(lost))))
