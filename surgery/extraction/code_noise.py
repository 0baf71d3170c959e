# SPDX-License-Identifier: Apache-2.0
"""Rounding to codes in the difference of two checkpoints: how much of it there is, and the edge below which it hides.

A side that is stored as codes brings the error of its quantiser into the difference, unless the other side was made
from the same rounded values. Both are told apart by what is left below the edge: rounding that is there leaves its
whole energy. Two sides on one grid have equal codes wherever the change is far below a step; what differs then is
almost all rounding, and no more of it is there than the difference itself has.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy

from surgery.extraction.factorise import FactorisedMatrix, TargetFactors
from surgery.extraction.pairing import Delta, Strip
from surgery.extraction.sampling import sample_runs
from surgery.extraction.stream.lanes import in_threads
from surgery.extraction.stream.tally import PairMeasure
from surgery_formats.arrays import Array
from surgery_formats.dtypes import DType
from surgery_formats.storage.aligned import as_stored
from surgery_formats.storage.base import Storage, read_values
from surgery_formats.storage.code_rounding import rounding_variance
from surgery_formats.storage.quantised import is_coded, is_quantised

__all__ = ["CodeNoise", "code_noise", "with_code_noise"]

_PRESENT = 0.5
"""Where a quantiser's rounding is in a difference, at least this share of it is left below the edge, beside what the
directions above the edge took with them."""


@dataclass(frozen=True, slots=True)
class CodeNoise:
    """Rounding to codes in one matrix of differences, estimated from some rows of each strip.

    Attributes:
        edge: Largest singular value that it alone would have; see `surgery_formats.linalg.noise`.
        energy: Expected ``||noise||_F^2``.
    """

    edge: float
    energy: float


def code_noise(delta: Delta, *, of_base: bool = True) -> CodeNoise | None:
    """The rounding that coded sides may bring; None if neither is coded, or a codec does not tell its grid.

    Args:
        delta: The difference.
        of_base: Whether BASE's counts: it is in no difference to what was made of its rounded values, and rounded again.
    """
    row, energy, cols = 0.0, 0.0, numpy.zeros(delta.shape[1])
    for strip in delta.strips:
        sums = _strip_noise(strip, of_base)
        if sums is None:
            return None
        rows, columns, scale = sums
        row, energy, cols = max(row, float(rows.max())), energy + scale * float(rows.sum()), cols + scale * columns
    return CodeNoise(math.sqrt(row) + math.sqrt(float(cols.max())), energy)


def _strip_noise(strip: Strip, of_base: bool) -> tuple[Array, Array, float] | None:
    """Expected energies of some rows, of every column over these rows, and how many times as many rows there are."""
    coded = [side for side in (strip.base, strip.tuned) if is_coded(side)]
    if not coded or not all(is_quantised(as_stored(side)) for side in coded):
        return None
    both = len(coded) == 2
    expected = [_variances(side) for side in coded if of_base or side is strip.tuned]
    if not expected:
        return None
    rows: list[Array] = []
    cols, seen = numpy.zeros(strip.tuned.shape[1]), 0
    for start, stop in sample_runs(strip.height, strip.tuned.shape[1]):
        first, last = strip.first + start, strip.first + stop
        variance = sum(of(first, last) for of in expected)
        if both:
            apart = read_values(strip.tuned, first, last, DType.F64) - read_values(strip.base, first, last, DType.F64)
            changes = apart * apart
            rows.append(numpy.minimum(variance.sum(1), changes.sum(1)))
            cols += numpy.minimum(variance.sum(0), changes.sum(0))
        else:
            rows.append(variance.sum(1))
            cols += variance.sum(0)
        seen += last - first
    return numpy.concatenate(rows), cols, strip.height / max(seen, 1)


def _variances(side: Storage) -> Callable[[int, int], Array]:
    """The expected squared errors of some rows, float64."""
    stored = as_stored(side)
    assert is_quantised(stored)
    if stored is side:
        return lambda first, last: rounding_variance(stored, first, last).astype(numpy.float64)
    height = stored.shape[1]  # of a turned matrix; a strip lies in one of them
    rows = stored.shape[0] // (side.shape[0] // height)

    @functools.cache
    def matrix(number: int) -> Array:
        return rounding_variance(stored, number * rows, (number + 1) * rows)

    def of(first: int, last: int) -> Array:
        number = first // height
        return matrix(number)[:, first - number * height : last - number * height].T.astype(numpy.float64)

    return of


@dataclass(frozen=True, slots=True)
class CodedFactors:
    """The factors of a target whose difference holds rounding to codes, or might.

    Attributes:
        factors: With edges that know of it, where it is there.
        energy: Of the rounding that is there, over all matrices.
        found: Whether it is there; None if it is not known.
    """

    factors: TargetFactors
    energy: float
    found: bool | None


def with_code_noise(
    factored: Mapping[str, TargetFactors], measures: Mapping[str, PairMeasure], workers: int
) -> tuple[dict[str, TargetFactors], dict[str, PairMeasure], tuple[str, ...]]:
    """Factors and measurements that know of quantisers' rounding, and findings about it for people.

    `factored` is by target path, `measures` by TUNED's name. What has no coded side is returned as it is.
    """
    concerned = [entry for entry in factored.values() if _kinds(entry)]
    results = list(in_threads(_coded, concerned, workers)) if concerned else []
    factors, measured = dict(factored), dict(measures)
    for result in results:
        target = result.factors.target
        factors[target.path] = result.factors
        for name in target.names:
            share = result.energy / len(target.names)
            measured[name] = replace(measured[name], noise=measured[name].noise + share)
    return factors, measured, tuple(_findings(results))


def _kinds(entry: TargetFactors) -> tuple[str, ...]:
    """``NF4 in BASE``, of the coded sides of a target."""
    strip = entry.target.deltas[0].strips[0]
    sides = (("BASE", strip.base), ("TUNED", strip.tuned))
    return tuple(f"{as_stored(side).kind} in {name}" for name, side in sides if is_coded(side))


def _coded(entry: TargetFactors) -> CodedFactors:
    matrices: list[FactorisedMatrix] = []
    energy, found = 0.0, list[bool | None]()
    for delta, matrix in zip(entry.target.deltas, entry.matrices, strict=True):
        known = [noise for noise in (code_noise(delta), code_noise(delta, of_base=False)) if noise is not None]
        if not known:
            found.append(None)
            matrices.append(matrix)
            continue
        seen = next((both for noise in known if (both := _with_noise(delta, matrix, noise)) is not None), None)
        found.append(seen is not None)
        matrices.append(matrix if seen is None else seen[0])
        energy += 0.0 if seen is None else seen[1]
    told = [flag for flag in found if flag is not None]
    return CodedFactors(replace(entry, matrices=tuple(matrices)), energy, any(told) if told else None)


def _with_noise(delta: Delta, matrix: FactorisedMatrix, noise: CodeNoise) -> tuple[FactorisedMatrix, float] | None:
    """The matrix with an edge that knows of a rounding, and the rounding's energy; None if it is not in there."""
    whole = replace(matrix, edge=math.hypot(matrix.edge, noise.edge))
    left = noise.energy * math.prod(1 - whole.signal / size for size in delta.shape)
    return (whole, noise.energy) if noise.energy > 0 and whole.residual(whole.signal) >= _PRESENT * left else None


def _findings(results: Iterable[CodedFactors]) -> Iterable[str]:
    by_kind: dict[tuple[str, ...], list[CodedFactors]] = {}
    for result in results:
        by_kind.setdefault(_kinds(result.factors), []).append(result)
    for kinds, group in by_kind.items():
        what, counts = " and ".join(kinds), Counter(result.found for result in group)
        if counts[True]:
            energy = math.fsum(result.factors.energy for result in group if result.found)
            share = math.sqrt(math.fsum(result.energy for result in group) / energy) if energy else 0.0
            yield (
                f"rounding to codes ({what}) is in {counts[True]} of {len(group)} differences and makes up "
                f"{min(share, 1.0):.1%} of their norm: what is below its edge is no change of the fine-tune"
            )
        if counts[False]:
            yield (
                f"rounding to codes ({what}) is not in {counts[False]} of {len(group)} differences: both sides have "
                "the same rounded values there"
            )
        if counts[None]:
            yield f"what rounding to codes ({what}) adds to {counts[None]} differences is not known"
