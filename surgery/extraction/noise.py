# SPDX-License-Identifier: Apache-2.0
"""Rounding noise in an extraction: the edge below which directions are noise, and what a merge would keep.

The edge needs every stored value of TUNED once (`surgery.extraction.stream.tally`). Survival is estimated from some
rows of BASE and the change that the chosen factors make there, without another pass over the files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from surgery.extraction.factorise import TargetFactors
from surgery.extraction.findings import MergedLoRA, Signal
from surgery.extraction.sampling import at_rows, read_runs, sample_runs
from surgery.extraction.stream.lanes import in_threads
from surgery.extraction.stream.tally import PairMeasure
from surgery_formats.arrays import Array
from surgery_formats.dtypes import DType
from surgery_formats.linalg.noise import survival
from surgery_formats.linalg.survival import Survival
from surgery_formats.storage.base import Storage
from surgery_formats.storage.quantised import is_coded

__all__ = [
    "NoiseReport",
    "Spectrum",
    "looks_merged",
    "noise_report",
    "remark",
    "survivals",
]

_STANDS_OUT = 1.8
"""Last value above the edge over the first below it. Merged LoRAs of rank 8 and 16 measured 1.9 to 5 from one unit in
the last place upwards, fine-tunes at most 1.65, in all stored types (`tests/linalg/test_noise.py` repeats the
measurement)."""
_LEAST, _MOST = 0.5, 1.1
"""Of what is left below the edge, over the energy expected of rounding. Merged LoRAs: 0.57 to 1.03 (below 1 where the
change is about as large as the spacing); fine-tunes whose spectrum stands out like that: above 1.14 or none."""
_ARITHMETIC = 2.0**-20  # of the norm: what float32 products leave
_NEARLY_ALL = 0.95  # of the layers agree: a few may have weaker directions


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of one difference.

    Attributes:
        values: Singular values, descending, as many as were computed.
        shape: ``(out, in)``.
        total: ``||D||_F^2``.
        rest: Energy that `values` leave.
        edge: Largest singular value that rounding alone would have.
        noise: Expected energy of rounding.
        signal: Number of values above the edge.
    """

    values: Sequence[float]
    shape: tuple[int, int]
    total: float
    rest: float
    edge: float
    noise: float
    signal: int

    @property
    def complete(self) -> bool:
        """Whether no further value can be above the edge."""
        return self.signal < len(self.values) or len(self.values) >= min(self.shape)

    @property
    def merged(self) -> bool:
        """Whether it looks like merged factors of rank `signal`: a gap at the edge, and only rounding below."""
        if not self.signal or self.signal >= min(self.shape):
            return False
        following = self.values[self.signal : self.signal + 1]
        if following and self.values[self.signal - 1] < _STANDS_OUT * following[0]:
            return False
        left = self.rest + math.fsum(value * value for value in self.values[self.signal :])
        # `signal` directions took their share of the rounding with them
        expected = self.noise * math.prod(1 - self.signal / size for size in self.shape)
        return _LEAST * expected <= left <= _MOST * expected + _ARITHMETIC**2 * self.total


def looks_merged(spectra: Iterable[Spectrum]) -> MergedLoRA | None:
    """The LoRA that was merged, if nearly all matrices are factors of one rank plus rounding; else None."""
    all_spectra = list(spectra)
    counts = Counter(spectrum.signal for spectrum in all_spectra if spectrum.merged)
    if not counts:
        return None
    rank, layers = max(counts.items(), key=lambda item: (item[1], item[0]))
    return MergedLoRA(rank, layers, len(all_spectra)) if layers >= _NEARLY_ALL * len(all_spectra) else None


def remark(rank: int, signal: Signal, *, asked: bool = True) -> str:
    """A remark if the rank, `asked` for by the user, exceeds the directions that are more than noise; else empty."""
    said = f"rank {rank}{' asked' if asked else ''}"
    beyond = rank - signal.count
    if beyond <= 0 or not signal.complete:
        return ""
    if not signal.count:
        return f"{said}: no direction stands out of rounding noise"
    noun = "direction is" if beyond == 1 else "directions are"
    return f"{said}: {beyond} {noun} rounding noise; suggest <= {signal.count}"


def spectra(factors: TargetFactors, noise: float) -> list[Spectrum]:
    """The spectrum of every matrix of a target; `noise` is the expected energy of rounding in all of it."""
    share = noise / len(factors.matrices)
    return [
        Spectrum(matrix.values, delta.logical_shape, matrix.total, matrix.rest, matrix.edge, share, matrix.signal)
        for delta, matrix in zip(factors.target.deltas, factors.matrices, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class NoiseReport:
    """Rounding noise in the targets that become factors.

    Attributes:
        signals: By target path; of experts, the largest.
        survival: Share of all factors' updates that a merge keeps.
        merged: The LoRA that TUNED seems to contain.
    """

    signals: Mapping[str, Signal]
    survival: float
    merged: MergedLoRA | None


def noise_report(
    targets: Iterable[TargetFactors],
    chosen: Mapping[str, TargetFactors],
    ranks: Mapping[str, int],
    measures: Mapping[str, PairMeasure],
    workers: int,
    gains: Mapping[str, Callable[[], Array]],
    known: Mapping[str, Survival],
) -> NoiseReport:
    """Estimate the noise.

    `targets` have the factors of the plain differences; by target path are those that will be stored (`chosen`),
    survivals that were computed already (`known`) and, of a DoRA, the factor of each row (or column, of an embedding)
    of ``W + BA`` (`gains`).
    """
    all_targets = tuple(targets)
    unknown = [chosen[factors.target.path] for factors in all_targets if factors.target.path not in known]
    survival_of = {**known, **survivals(unknown, ranks, workers, gains)}
    signals, all_spectra = {}, []
    for factors in all_targets:
        own_spectra = spectra(factors, math.fsum(measures[name].noise for name in factors.target.names))
        top = max(own_spectra, key=lambda spectrum: spectrum.signal)
        complete = all(spectrum.complete for spectrum in own_spectra)
        survival = survival_of[factors.target.path].survival
        signals[factors.target.path] = Signal(top.edge, top.signal, min(top.shape), complete, survival)
        all_spectra += own_spectra
    return NoiseReport(
        signals,
        Survival.total(survival_of[factors.target.path] for factors in all_targets).survival,
        looks_merged(all_spectra),
    )


def survivals(
    factored: Iterable[TargetFactors],
    ranks: Mapping[str, int],
    workers: int,
    gains: Mapping[str, Callable[[], Array]],
) -> dict[str, Survival]:
    """What a merge of the factors into BASE's stored type would keep, by target path; in bfloat16 of what is quantised."""

    def of(factors: TargetFactors) -> tuple[str, Survival]:
        path = factors.target.path
        return path, Survival.total(_survival(factors, ranks[path], gains.get(path)))

    return dict(in_threads(of, factored, workers))


def _merged_type(base: Storage) -> DType:
    """The type of a merged weight: a quantised one becomes one of 16 bits."""
    return DType.BF16 if is_coded(base) else base.dtype


def _survival(factors: TargetFactors, rank: int, gains: Callable[[], Array] | None) -> Iterator[Survival]:
    gain = None if gains is None else gains()
    by_column = factors.target.form == "embedding" or factors.target.deltas[0].transposed
    for index, delta in enumerate(factors.target.deltas):
        left, right = factors.factors(index, rank)  # (out, rank), (rank, in)
        rows_side, cols_side = (right.T, left.T) if delta.transposed else (left, right)
        at = 0
        for strip in delta.strips:
            share = len(factors.target.deltas) * len(delta.strips)
            runs = list(sample_runs(strip.height, delta.shape[1], share))
            rows = [(at + start, at + stop) for start, stop in runs]
            change = at_rows(rows_side, rows) @ cols_side
            base = read_runs(strip.base, strip.first, runs)
            if gain is not None:  # g (W + BA) - W
                scale = gain if by_column else at_rows(gain, rows, axis=-1)[:, None]
                change = scale * change + (scale - 1) * base
            yield survival(base, change, _merged_type(strip.base))
            at += strip.height
