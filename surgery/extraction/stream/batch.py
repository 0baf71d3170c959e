# SPDX-License-Identifier: Apache-2.0
"""Batches for a GPU: differences of one shape are measured and factorised together, in few calls with much to do each.

Which matrices make a batch follows from the checkpoints and the options alone, so that the result is the same on any
number of devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from surgery.extraction.factorise import FactorisedMatrix, FactorisedStack, StoredFactorSpec, factorise_stack
from surgery.extraction.pairing import Strip
from surgery.extraction.ranks import RankGoal
from surgery.extraction.sampling import at_rows, sample_runs
from surgery.extraction.stream.feed import Read
from surgery.extraction.stream.lanes import Lane
from surgery.extraction.stream.order import ByteObserver
from surgery.extraction.stream.scratch import ScratchFile
from surgery.extraction.stream.tally import MEASURED, PairMeasure, measure_stack
from surgery.extraction.targets import LowRankTarget
from surgery_formats.arrays import Array, cast, device_of, empty, namespace
from surgery_formats.dtypes import DType

__all__ = ["Batch", "batches_of", "factorise_batch", "warm_batch"]

_ELEMENTS = 1 << 28
"""Of one batch: both sides in 16 bits and the difference in float32 take 2 GB of the device. Results depend on it in
the last bits: fixed."""


class Likeness(NamedTuple):
    """What the matrices of a batch have in common.

    Attributes:
        shape: As they are stored.
        base: BASE's stored type.
        tuned: TUNED's stored type.
        transposed: Whether they are stored ``(in, out)``.
        rank: Directions to compute.
        plan: How the factors will be stored.
    """

    shape: tuple[int, int]
    base: DType
    tuned: DType
    transposed: bool
    rank: int
    plan: StoredFactorSpec

    @property
    def numel(self) -> int:
        """Elements of one matrix."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Batch:
    """Targets whose differences are alike."""

    like: Likeness
    targets: tuple[LowRankTarget, ...]

    @property
    def strips(self) -> list[Strip]:
        """The one strip of each."""
        return [target.deltas[0].strips[0] for target in self.targets]

    @property
    def numel(self) -> int:
        """Elements of all."""
        return self.like.numel * len(self.targets)

    @property
    def need(self) -> int:
        """Bytes of device memory: both sides, the difference, and what is worked out from a part of it."""
        stored = (self.like.base.bits + self.like.tuned.bits) // 8
        return (stored + 4) * self.numel + 20 * max(MEASURED, self.like.numel)


def batches_of(
    targets: Iterable[LowRankTarget],
    goal: RankGoal,
    spec_of: Callable[[LowRankTarget], StoredFactorSpec | None],
) -> tuple[Batch, ...]:
    """Two targets or more to a batch, in the order of the files; what fits into none is left out."""
    alike: dict[Likeness, list[LowRankTarget]] = {}
    for target in targets:
        like = _likeness(target, goal, spec_of(target))
        if like is not None and like.numel <= _ELEMENTS:
            alike.setdefault(like, []).append(target)
    batches = []
    for like, members in alike.items():
        count = max(1, _ELEMENTS // like.numel)
        parts = [members[at : at + count] for at in range(0, len(members), count)]
        batches += [Batch(like, tuple(part)) for part in parts if len(part) > 1]
    return tuple(batches)


def _likeness(target: LowRankTarget, goal: RankGoal, plan: StoredFactorSpec | None) -> Likeness | None:
    """None for what a batch does not do: experts, embeddings, float64, and ranks that are yet to be found."""
    delta = target.deltas[0]
    strip = delta.strips[0]
    rank = None if goal.rank_of(target) is None else goal.limit(target)
    if rank is None or plan is None or target.form not in ("linear", "conv"):
        return None
    if len(target.deltas) > 1 or len(delta.strips) > 1 or delta.dtype is not DType.F32:
        return None
    if not strip.height == strip.base.shape[0] == strip.tuned.shape[0]:
        return None
    return Likeness(delta.shape, strip.base.dtype, strip.tuned.dtype, delta.transposed, rank, plan)


def factorise_batch(
    batch: Batch, observers: Sequence[ByteObserver | None], scratch: ScratchFile, lane: Lane
) -> tuple[list[PairMeasure], Mapping[int, FactorisedMatrix]]:
    """Read, measure and factorise: what was measured of every target, and by its number the factors of what changed.

    Raises:
        FitError: NaN or Inf.
    """
    like, strips = batch.like, batch.strips
    with lane.memory.reserve(batch.need):
        base, tuned = (empty((len(strips), *like.shape), dtype, lane.device) for dtype in (like.base, like.tuned))
        reads = [Read(s.base, 0, old, observe) for s, old, observe in zip(strips, base, observers, strict=True)]
        reads += [Read(strip.tuned, 0, new) for strip, new in zip(strips, tuned, strict=True)]
        lane.feed.fill(reads)
        with lane.turn:
            measured, sampled = _measured(batch, base, tuned), _sampled(batch, base)
            del base, tuned, reads
            changed, factorised = _factorised(like, measured, sampled)
        # the next batch is computed while this one is put away
        kept = [] if factorised is None else factorised.kept(scratch)
        return measured.measures, dict(zip(changed, kept, strict=True))


def warm_batch(batch: Batch, lane: Lane) -> None:
    """Do to two made-up matrices what is done to a batch; nothing is read."""
    like, two = batch.like, Batch(batch.like, batch.targets[:2])
    values = empty((2, *like.shape), DType.F32, lane.device)
    values[...] = 1
    triangle = namespace(values).tril(values)
    base = cast(values - triangle, like.base)
    _factorised(like, _measured(two, base, cast(values, like.tuned)), _sampled(two, base))


class _Measured(NamedTuple):
    """The differences ``(count, n, cols)`` of a batch, and for each what was measured and the edge of its rounding."""

    difference: Array
    measures: list[PairMeasure]
    edges: list[float]


def _measured(batch: Batch, base: Array, tuned: Array) -> _Measured:
    difference = empty(tuned.shape, DType.F32, device_of(tuned))
    sides = [(strip.base, strip.tuned) for strip in batch.strips]
    return _Measured(difference, *measure_stack(base, tuned, difference, sides))


def _sampled(batch: Batch, base: Array) -> Array | None:
    """Some rows of BASE, where its matrices are stored as they act, in elements."""
    if batch.like.transposed or any(strip.base.elements is None for strip in batch.strips):
        return None
    return at_rows(base, list(sample_runs(*batch.like.shape)))


def _factorised(like: Likeness, measured: _Measured, sampled: Array | None) -> tuple[list[int], FactorisedStack | None]:
    """The numbers of the matrices that changed, and their factors."""
    difference, measures, edges = measured
    changed = [number for number, measure in enumerate(measures) if measure.changed]
    if not changed:
        return [], None
    if len(changed) < len(measures):
        difference, sampled = difference[changed, ...], None if sampled is None else sampled[changed, ...]
    return changed, factorise_stack(
        difference,
        like.rank,
        energies=[measures[number].energy for number in changed],
        edges=[edges[number] for number in changed],
        plan=like.plan,
        transposed=like.transposed,
        base=sampled,
    )
