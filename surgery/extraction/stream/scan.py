# SPDX-License-Identifier: Apache-2.0
"""One pass over both checkpoints.

Each pair is read once, measured while it is subtracted, and factorised while in memory.

A matrix that is too large to hold is read again for every product instead.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy

from surgery.extraction.factorise import FactorisedMatrix, StoredFactorSpec, TargetFactors, factorise
from surgery.extraction.pairing import Delta, Pair, check_finite, nbytes_of
from surgery.extraction.ranks import RankGoal
from surgery.extraction.storage_plan import MOST_ROWS
from surgery.extraction.stream.batch import Batch, factorise_batch, warm_batch
from surgery.extraction.stream.feed import DEVICE_BLOCK, DirectFeed, RowPair
from surgery.extraction.stream.lanes import Job, Lane, Lanes, Stop
from surgery.extraction.stream.order import ByteObserver
from surgery.extraction.stream.scan_plan import HELD, SMALL, ScanPlan, ScanUnit
from surgery.extraction.stream.scratch import ScratchFile
from surgery.extraction.stream.tally import PairMeasure, Tally, same_bits
from surgery.extraction.targets import LowRankTarget, TunedParameter
from surgery.progress import Callback, Progress
from surgery_formats.arrays import array_of, cast, empty
from surgery_formats.dtypes import DType
from surgery_formats.linalg.noise import NoiseTally
from surgery_formats.linalg.svd import left_over, truncated_svd
from surgery_formats.models.identity import Digests
from surgery_formats.storage.base import Storage
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["ScanResult", "scan", "warming"]

_WARM = (2048, 2048)
"""Shape of the matrix that a lane begins with, one that large matrices' products are chosen for."""


@dataclass(frozen=True)
class ScanResult:
    """The result of the pass.

    Attributes:
        measures: Of every compared pair, by TUNED's name.
        factored: Factors of the targets that changed, by path.
        began: `time.monotonic` when the first byte of a tensor was read.
        digests: Of BASE's tensors, for its content id.
        findings: About rounding to codes.
    """

    measures: dict[str, PairMeasure] = field(default_factory=dict)
    factored: dict[str, TargetFactors] = field(default_factory=dict)
    began: float = 0.0
    digests: Digests = field(default_factory=Digests)
    findings: tuple[str, ...] = ()


def scan(
    plan: ScanPlan,
    scratch: ScratchFile,
    lanes: Lanes,
    progress: Callback | None,
    done: Callable[[ScanUnit, ScanResult], None] | None = None,
) -> ScanResult:
    """Compare every pair and factorise every target that changed.

    `done` is called with each unit that is complete, in its lane, and with what is known so far.

    Raises:
        FitError: NaN or Inf.
        ResourceError: a device has too little memory.
    """
    work = _Work(
        {parameter.pair.name: parameter for parameter in plan.layout.parameters},
        plan.goal,
        plan.spec_of,
        scratch,
        _ReadMeter(plan.nbytes, progress),
        ScanResult({}, {}, time.monotonic()),
        done,
    )
    lanes.run([partial(work.unit, unit) for unit in plan.units])
    return work.result


def warming(plan: ScanPlan) -> Job:
    """What a GPU's lanes do first: its code is loaded at the first use, while all other lanes wait.

    Together they do to made-up matrices all that `scan` does to real ones; nothing is read.
    """
    # one iterator, which the lanes share
    waiting = iter({unit.batch.like: unit.batch for unit in plan.units if unit.batch}.values())
    singly = any(unit.targets and not unit.batch for unit in plan.units)
    strips = [strip for target in plan.layout.targets[:1] for strip in target.deltas[0].strips[:1]]

    def warm(lane: Lane, stop: Stop) -> None:
        for strip in strips:
            difference = lane.space(*_WARM, DType.F32)
            values = numpy.zeros(_WARM), numpy.tri(*_WARM)
            old, new = (array_of(value, DType.F32, difference) for value in values)
            tally, noise = Tally(strip.base, strip.tuned, len(new)), NoiseTally()
            tally.subtract(0, cast(old, strip.base.dtype), cast(new, strip.tuned.dtype), difference, noise)
            energy, _ = tally.news()
            energy = max(energy, tally.result().energy, noise.edge)  # asked for, for what they do on the device
            if not singly:
                continue
            svd = truncated_svd(difference, rank=16, total=math.sqrt(energy))
            right = (svd.V * svd.S).T
            left_over(difference, svd.U, right, total=math.sqrt(energy), how="sums")
            left_over(difference, svd.U, right, total=math.sqrt(energy), how="plain").sum().item()
        for batch in waiting:
            warm_batch(batch, lane)

    return warm


@dataclass(frozen=True)
class _Work:
    parameters: Mapping[str, TunedParameter]
    goal: RankGoal
    spec_of: Callable[[LowRankTarget], StoredFactorSpec | None]
    scratch: ScratchFile
    meter: _ReadMeter
    result: ScanResult
    done: Callable[[ScanUnit, ScanResult], None] | None

    def unit(self, unit: ScanUnit, lane: Lane, stop: Stop) -> None:
        """All of a unit."""
        if unit.batch:
            self._batch(unit.batch, lane)
        elif unit.targets:
            self._targets(unit.targets, lane, stop)
        else:
            self._alone(unit.names, lane, stop)
        if self.done is not None and not stop():
            self.done(unit, self.result)

    def _alone(self, names: Iterable[str], lane: Lane, stop: Stop) -> None:
        """Compare tensors that are not factorised."""
        for name in names:
            if stop():
                return
            pair = self.parameters[name].pair
            with lane.memory.reserve(_need(min(pair.numel, DEVICE_BLOCK))):
                self.result.measures[name] = _compare(pair, self._limit(name), lane, self.result.digests)
            self.meter.add(pair.nbytes)

    def _batch(self, batch: Batch, lane: Lane) -> None:
        """Compare and factorise targets of one shape together."""
        observers = [_observer(self.result.digests, strip.base) for strip in batch.strips]
        measures, matrices = factorise_batch(batch, observers, self.scratch, lane)
        for target, measure in zip(batch.targets, measures, strict=True):
            self.result.measures[target.names[0]] = measure
        for number, matrix in matrices.items():
            target = batch.targets[number]
            self.result.factored[target.path] = TargetFactors(target, (matrix,))
        self.meter.add(sum(nbytes_of(strip.tuned) for strip in batch.strips))

    def _targets(self, targets: Sequence[LowRankTarget], lane: Lane, stop: Stop) -> None:
        """Compare and factorise the tensors of one target, or of several that have a tensor in common."""
        owners = {name: target for target in targets for name in target.names}
        tallies = {name: _tally(self.parameters[name].pair, self._limit(name), owner) for name, owner in owners.items()}
        strips = [strip for target in targets for delta in target.deltas for strip in delta.strips]
        bases = {strip.tuned.name: strip.base for strip in strips}
        seen = {tally: _observer(self.result.digests, bases[name]) for name, tally in tallies.items()}
        found: list[TargetFactors] = []
        with lane.memory.reserve(_need(max(delta.numel for target in targets for delta in target.deltas))):
            for target in targets:
                matrices: list[FactorisedMatrix] = []
                for delta in target.deltas:
                    if stop():
                        return
                    matrix = self._matrix(target, delta, tallies, seen, lane)
                    if matrix is not None:
                        matrices.append(matrix)
                if matrices:
                    found.append(TargetFactors(target, tuple(matrices)))
        for name, tally in tallies.items():
            self.result.measures[name] = tally.result()
        for factors in found:
            if any(self.result.measures[name].changed for name in factors.target.names):
                self.result.factored[factors.target.path] = factors

    def _limit(self, name: str) -> int:
        return MOST_ROWS if self.parameters[name].form == "embedding" else 0

    def _matrix(
        self,
        target: LowRankTarget,
        delta: Delta,
        tallies: Mapping[str, Tally],
        seen: Mapping[Tally, ByteObserver | None],
        lane: Lane,
    ) -> FactorisedMatrix | None:
        """Factorise one matrix; None if it is its target's only one and did not change."""
        held = delta.numel <= HELD["cuda" if lane.on_gpu else "cpu"]
        whole = lane.space(*delta.shape, delta.dtype) if held else None
        noise, moved, at = NoiseTally(), False, 0
        energies: list[float] = []
        for strip in delta.strips:
            tally = tallies[strip.tuned.name]
            for rows in lane.feed.pairs(strip.base, strip.tuned, strip.first, strip.last, seen[tally]):
                count = len(rows.tuned)
                into = empty(rows.tuned.shape, delta.dtype, lane.device) if whole is None else whole[at : at + count]
                tally.subtract(rows.first, rows.base, rows.tuned, into, noise)
                at += count
            energy, differs = tally.news()
            energies, moved = [*energies, energy], moved or differs
        self.meter.add(sum(nbytes_of(strip.tuned) // strip.tuned.shape[0] * strip.height for strip in delta.strips))
        if not moved and len(target.deltas) == 1:
            return None
        return factorise(
            delta if whole is None else whole,
            self.goal.rank,
            self.goal.limit(target),
            [strip.height for strip in delta.strips],
            self.scratch,
            lane.device,
            energies=energies,
            moved=moved,
            edge=noise.edge,
            plan=self.spec_of(target),
            transposed=delta.transposed,
        )


def _need(numel: int) -> int:
    """Bytes of device memory for the difference, what is left of it, and two blocks of both sides with their exponents."""
    return 8 * numel + 24 * min(numel, DEVICE_BLOCK)


def _tally(pair: Pair, row_limit: int, target: LowRankTarget | None) -> Tally:
    stacked = target is not None and target.form == "experts"
    base, tuned = pair.matrices(stacked=stacked)
    return Tally(base, tuned, min(base.shape[0], tuned.shape[0]), row_limit)


def _observer(digests: Digests, weight: Storage) -> ByteObserver | None:
    """Digests the bytes of a weight as they are read; only of one tensor that is read as it is stored, and not turned."""
    return digests.claim(weight.elements) if isinstance(weight.elements, StoredTensor) else None


def _compare(pair: Pair, row_limit: int, lane: Lane, digests: Digests) -> PairMeasure:
    """Compare a pair that is not factorised; of a grown vocabulary, the rows that both have."""
    base, tuned = pair.matrices()
    rows, cols = min(base.shape[0], tuned.shape[0]), tuned.shape[1]
    observe = _observer(digests, base)
    if not pair.is_float:
        return PairMeasure(
            any(list(map(_differs, DirectFeed().pairs(base, tuned, 0, rows, observe)))), numel=rows * cols
        )
    feed, device = (lane.feed, lane.device) if pair.numel > SMALL else (DirectFeed(), "cpu")
    exact = DType.F64 if DType.F64 in (pair.base.dtype, pair.tuned.dtype) else DType.F32
    tally = _tally(pair, row_limit, None)
    for rows_read in feed.pairs(base, tuned, 0, rows, observe):
        difference = empty(rows_read.tuned.shape, exact, device)
        tally.subtract(rows_read.first, rows_read.base, rows_read.tuned, difference, None)
    measure = tally.result()
    if pair.grown > 0:
        check_finite(tuned, rows, tuned.shape[0])
        return replace(measure, changed=True)
    return measure


def _differs(rows: RowPair) -> bool:
    return not same_bits(rows.base, rows.tuned)


class _ReadMeter:
    """Adds up bytes from all threads."""

    def __init__(self, total: int, callback: Callback | None) -> None:
        self._total, self._done, self._callback = total, 0, callback
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._callback is not None:
                self._callback(Progress(self._done, self._total, "factorising"))
