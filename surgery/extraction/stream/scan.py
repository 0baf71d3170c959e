# SPDX-License-Identifier: Apache-2.0
"""One pass over both checkpoints: every pair is read once, compared while it is subtracted, and factorised while the difference is there.

A matrix too large to be held is read again at every product instead.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from surgery.extraction.factorise import Criterion, Factored, Piece, StoredFactorSpec, factorise
from surgery.extraction.pairing import Delta, Pair, pair_up
from surgery.extraction.storage_plan import MOST_ROWS
from surgery.extraction.stream.feed import DEVICE_BLOCK, Direct, Feed, Rows, Seen
from surgery.extraction.stream.lanes import Job, Lane, Lanes, Stop
from surgery.extraction.stream.scratch import ScratchFile
from surgery.extraction.stream.tally import PairMeasure, Tally, check_finite
from surgery.extraction.targets import LowRankTarget, TunedParameter, spots_of, units_of
from surgery.progress import Callback, Progress
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import Component
from surgery_formats.models.identity import Digests
from surgery_formats.storage.plain import Plain

__all__ = ["Layout", "ScanResult", "layout_of", "scan", "warm"]

HELD = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Elements up to which a difference is held, by type of device: 512 MB of float32 on a CPU, 4 GB on a GPU."""
_WARM = {"cpu": (512, 384), "cuda": (2048, 2048)}
"""Shape of the matrix that a lane begins with; on a GPU one that large matrices' products are chosen for."""
_SMALL = 1 << 16  # elements of a vector that is not worth a lane of its own
_BATCH = 64  # of them in one job


@dataclass(frozen=True, slots=True)
class Layout:
    """What there is to compare.

    Attributes:
        pairs: Every tensor of TUNED.
        spots: Those that are compared, with their forms.
        units: What is factorised.
        whole: Paths of units that are compared only: whatever changed in them is stored as it is.
    """

    pairs: tuple[Pair, ...]
    spots: tuple[TunedParameter, ...]
    units: tuple[LowRankTarget, ...]
    whole: frozenset[str]


def layout_of(old: Component, new: Component, *, full: bool) -> Layout:
    """Pair two checkpoints up; with `full`, embedding and head are stored whole.

    Raises:
        FitError: they do not belong together.
    """
    pairs = pair_up(old, new)
    spots = spots_of(pairs, old)
    units = units_of(spots, old)
    grown = {spot.pair.name for spot in spots if spot.pair.grown > 0}
    apart = {new.embedding, new.head} if full or (old.tied and bool(old.head)) else set()
    whole = frozenset(unit.path for unit in units if (grown | apart).intersection(unit.names))
    return Layout(pairs, spots, units, whole)


@dataclass(frozen=True)
class ScanResult:
    """What the pass found.

    Attributes:
        measures: By TUNED's name.
        factored: Units that changed, by path.
        began: `time.monotonic` when the first byte of a tensor was asked for.
        digests: Of BASE's tensors, for its content id.
    """

    measures: dict[str, PairMeasure] = field(default_factory=dict)
    factored: dict[str, Factored] = field(default_factory=dict)
    began: float = 0.0
    digests: Digests = field(default_factory=Digests)


def scan(
    layout: Layout,
    criterion_of: Callable[[LowRankTarget], Criterion],
    plan_of: Callable[[LowRankTarget], StoredFactorSpec | None],
    scratch: ScratchFile,
    lanes: Lanes,
    progress: Callback | None,
) -> ScanResult:
    """Compare and factorise everything.

    Args:
        layout: What there is.
        criterion_of: How the rank of a unit is found.
        plan_of: How a unit's factors will be written, where that is known.
        scratch: Where factors are kept.
        lanes: Where the work is done.
        progress: Called with every tensor.

    Raises:
        FitError: NaN or Inf.
        ResourceError: a device has too little memory.
    """
    meter = _ReadMeter(sum(spot.pair.tuned.nbytes for spot in layout.spots), progress)
    work = _Work(
        {spot.pair.name: spot for spot in layout.spots},
        criterion_of,
        plan_of,
        scratch,
        meter,
        ScanResult({}, {}, time.monotonic()),
    )
    jobs: list[tuple[int, Job]] = []
    lone: list[str] = []
    for unit in layout.units:
        if unit.path in layout.whole:
            lone += unit.names
        else:
            jobs.append((max(delta.numel for delta in unit.deltas), partial(work.unit, unit)))
    inside = {name for unit in layout.units for name in unit.names}
    lone += [spot.pair.name for spot in layout.spots if spot.pair.name not in inside]
    small = [name for name in lone if work.spots[name].pair.tuned.numel <= _SMALL]
    jobs += [
        (work.spots[name].pair.tuned.numel, partial(work.alone, (name,))) for name in lone if name not in set(small)
    ]
    jobs += [(0, partial(work.alone, tuple(small[at : at + _BATCH]))) for at in range(0, len(small), _BATCH)]
    # What takes longest begins first; the others as they lie in the files.
    lanes.run([job for _, job in sorted(jobs, key=lambda one: -one[0] if one[0] >= HELD["cpu"] else 0)])
    return work.found


def warm(layout: Layout, lane: Lane, stop: Stop) -> None:
    """Use what a GPU will be asked for once: its code is loaded when it is first used, while all other lanes wait.

    Everything that `scan` does to a matrix is done to one that is made up; nothing is read.
    """
    import torch

    from surgery_formats.linalg.noise import NoiseTally
    from surgery_formats.linalg.svd import left_over, truncated_svd

    strips = [strip for unit in layout.units[:1] for strip in unit.deltas[0].strips[:1]]
    for strip in strips:
        shape = _WARM[lane.device.type]
        old = torch.zeros(shape, dtype=strip.base.tensor.dtype.torch, device=lane.device)
        new = torch.ones(shape, dtype=strip.tuned.tensor.dtype.torch, device=lane.device).tril()
        made = lane.space(*shape, layout.units[0].deltas[0].dtype)
        tally, noise = Tally(strip.base, strip.tuned, shape[0]), NoiseTally()
        tally.subtract(0, old, new, made, noise)
        energy, _ = tally.news()
        energy = max(energy, tally.result().energy, noise.edge)  # asked for, for what they do on the device
        found = truncated_svd(made, rank=16, total=math.sqrt(energy))
        right = (found.V * found.S).T
        left_over(made, found.U, right, total=math.sqrt(energy), how="sums")
        left_over(made, found.U, right, total=math.sqrt(energy), how="plain").sum().item()


@dataclass(frozen=True)
class _Work:
    spots: Mapping[str, TunedParameter]
    criterion_of: Callable[[LowRankTarget], Criterion]
    plan_of: Callable[[LowRankTarget], StoredFactorSpec | None]
    scratch: ScratchFile
    meter: _ReadMeter
    found: ScanResult

    def alone(self, names: Iterable[str], lane: Lane, stop: Stop) -> None:
        """Compare tensors that are not factorised."""
        for name in names:
            if stop():
                return
            pair = self.spots[name].pair
            with lane.room.taken(_need(min(pair.tuned.numel, DEVICE_BLOCK))):
                self.found.measures[name] = _compare(pair, self._limit(name), lane, self.found.digests)
            self.meter.add(pair.tuned.nbytes)

    def unit(self, unit: LowRankTarget, lane: Lane, stop: Stop) -> None:
        """Compare and factorise what belongs together."""
        tallies = {name: _tally(self.spots[name].pair, self._limit(name), unit) for name in unit.names}
        seen = {tally: self.found.digests.claim(self.spots[name].pair.base) for name, tally in tallies.items()}
        pieces: list[Piece] = []
        with lane.room.taken(_need(max(delta.numel for delta in unit.deltas))):
            for delta in unit.deltas:
                if stop():
                    return
                piece = self._piece(unit, delta, tallies, seen, lane)
                if piece is not None:
                    pieces.append(piece)
        for name, tally in tallies.items():
            self.found.measures[name] = tally.result()
        if pieces and any(self.found.measures[name].changed for name in unit.names):
            self.found.factored[unit.path] = Factored(unit, tuple(pieces))

    def _limit(self, name: str) -> int:
        return MOST_ROWS if self.spots[name].form == "embedding" else 0

    def _piece(
        self,
        unit: LowRankTarget,
        delta: Delta,
        tallies: Mapping[str, Tally],
        seen: Mapping[Tally, Seen | None],
        lane: Lane,
    ) -> Piece | None:
        """None where a unit of one matrix did not change."""
        from surgery_formats.linalg.noise import NoiseTally

        held = delta.numel <= HELD[lane.device.type]
        whole = lane.space(*delta.stored_shape, delta.dtype) if held else None
        noise, moved, at = NoiseTally(), False, 0
        energies: list[float] = []
        for strip in delta.strips:
            tally = tallies[strip.tuned.tensor.name]
            for rows in lane.feed.pairs(strip.base, strip.tuned, strip.first, strip.last, seen[tally]):
                count = len(rows.tuned)
                shape = rows.tuned.shape
                into = rows.tuned.new_empty(shape, dtype=delta.dtype) if whole is None else whole[at : at + count]
                tally.subtract(rows.first, rows.base, rows.tuned, into, noise)
                at += count
            energy, differs = tally.news()
            energies, moved = [*energies, energy], moved or differs
        self.meter.add(
            sum(
                strip.tuned.tensor.nbytes // strip.tuned.shape[0] * (strip.last - strip.first) for strip in delta.strips
            )
        )
        if not moved and len(unit.deltas) == 1:
            return None
        criterion = self.criterion_of(unit)
        return factorise(
            delta.stored if whole is None else whole,
            criterion,
            criterion.limit(unit.cost),
            [strip.last - strip.first for strip in delta.strips],
            self.scratch,
            lane.device,
            energies=energies,
            moved=moved,
            edge=noise.edge,
            plan=self.plan_of(unit),
            transposed=delta.transposed,
        )


def _need(numel: int) -> int:
    """Bytes of device memory: the difference, what is left of it at the end, and a block of both sides with their exponents."""
    return 8 * numel + 16 * min(numel, DEVICE_BLOCK)


def _tally(pair: Pair, row_limit: int, unit: LowRankTarget | None) -> Tally:
    stacked = unit is not None and unit.form == "experts"
    base, tuned = Plain.of(pair.base, stacked=stacked), Plain.of(pair.tuned, stacked=stacked)
    return Tally(base, tuned, min(base.shape[0], tuned.shape[0]), row_limit)


def _compare(pair: Pair, row_limit: int, lane: Lane, digests: Digests) -> PairMeasure:
    """A pair by itself: of equal shapes, or grown (then the common rows are compared)."""
    import torch

    base, tuned = Plain.of(pair.base), Plain.of(pair.tuned)
    rows, cols = min(base.shape[0], tuned.shape[0]), tuned.shape[1]
    seen = digests.claim(pair.base)
    if not (pair.tuned.dtype.is_float and pair.base.dtype.is_float):
        return PairMeasure(any(list(map(_differs, Direct().pairs(base, tuned, 0, rows, seen)))), numel=rows * cols)
    feed: Feed = lane.feed if pair.tuned.numel > _SMALL else Direct()
    wide = DType.F64 in (pair.base.dtype, pair.tuned.dtype)
    tally = _tally(pair, row_limit, None)
    for found in feed.pairs(base, tuned, 0, rows, seen):
        made = found.tuned.new_empty(found.tuned.shape, dtype=torch.float64 if wide else torch.float32)
        tally.subtract(found.first, found.base, found.tuned, made, None)
    measure = tally.result()
    if pair.grown > 0:
        check_finite(tuned, rows, tuned.shape[0])
        return replace(measure, changed=True)
    return measure


def _differs(rows: Rows) -> bool:
    import torch

    return rows.base.dtype != rows.tuned.dtype or not torch.equal(rows.base, rows.tuned)


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
