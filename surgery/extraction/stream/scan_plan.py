# SPDX-License-Identifier: Apache-2.0
"""What one pass over both checkpoints will do: units of work, each of which needs no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from surgery.engine.sharing import shared_out
from surgery.extraction.factorise import StoredFactorSpec
from surgery.extraction.pairing import Pair, pair_up
from surgery.extraction.ranks import RankGoal
from surgery.extraction.stream.batch import Batch, batches_of
from surgery.extraction.targets import LowRankTarget, TunedParameter, low_rank_targets, sharing, tuned_parameters
from surgery_formats.models.component import Component

__all__ = ["HELD", "SMALL", "ScanLayout", "ScanPlan", "ScanUnit", "layout_of", "plan_scan"]

HELD = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Elements up to which a difference is held, by type of device: 512 MB of float32 on a CPU, 4 GB on a GPU."""
SMALL = 1 << 16
"""Elements of a vector that is not worth a unit of its own."""
_TOGETHER = 64  # of them in one unit


@dataclass(frozen=True, slots=True)
class ScanLayout:
    """The tensors of both checkpoints, paired up.

    Attributes:
        pairs: Every tensor of TUNED.
        parameters: The compared ones, with their forms.
        targets: What can be factorised.
        whole: Paths of targets that are only compared, because their changes are stored as they are.
    """

    pairs: tuple[Pair, ...]
    parameters: tuple[TunedParameter, ...]
    targets: tuple[LowRankTarget, ...]
    whole: frozenset[str]

    @property
    def factorised(self) -> tuple[LowRankTarget, ...]:
        """The targets that are not only compared."""
        return tuple(target for target in self.targets if target.path not in self.whole)


def layout_of(old: Component, new: Component, *, full: bool, matrices: bool = False) -> ScanLayout:
    """Pair two checkpoints up; with `full`, embedding and head are stored whole, with `matrices` all other matrices too.

    Raises:
        FitError: the checkpoints do not fit together.
    """
    pairs = pair_up(old, new)
    parameters = tuned_parameters(pairs, old)
    targets = low_rank_targets(parameters, old)
    grown = {parameter.pair.name for parameter in parameters if parameter.pair.grown > 0}
    apart = {new.embedding, new.head} if full or (old.tied and bool(old.head)) else set()
    whole = frozenset(target.path for target in targets if matrices or (grown | apart).intersection(target.names))
    return ScanLayout(pairs, parameters, targets, whole)


@dataclass(frozen=True, slots=True)
class ScanUnit:
    """Tensors that one lane compares, from start to end, and the targets that they make, which it factorises.

    Attributes:
        names: TUNED's names.
        targets: None, one, those that have a tensor in common, or those of a batch.
        batch: Of targets that a GPU factorises together.
        nbytes: Of what TUNED stores of them.
    """

    names: tuple[str, ...]
    targets: tuple[LowRankTarget, ...]
    nbytes: int
    batch: Batch | None = None


@dataclass(frozen=True)
class ScanPlan:
    """One pass over both checkpoints.

    Attributes:
        layout: The paired tensors.
        goal: How ranks are found.
        spec_of: How a target's factors will be stored, where that is known.
        units: In the order in which they begin.
    """

    layout: ScanLayout
    goal: RankGoal
    spec_of: Callable[[LowRankTarget], StoredFactorSpec | None]
    units: tuple[ScanUnit, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of TUNED to read."""
        return sum(unit.nbytes for unit in self.units)

    def shares(self, count: int) -> list[dict[int, ScanUnit]]:
        """The units of each of `count` shares, by number: all are about as many bytes."""
        shares = shared_out([unit.nbytes for unit in self.units], count)
        return [{number: self.units[number] for number in sorted(own)} for own in shares]

    def of(self, units: Mapping[int, ScanUnit]) -> ScanPlan:
        """The pass over some units alone."""
        return replace(self, units=tuple(units.values()))


def plan_scan(
    layout: ScanLayout,
    goal: RankGoal,
    spec_of: Callable[[LowRankTarget], StoredFactorSpec | None],
    *,
    on_gpus: bool,
) -> ScanPlan:
    """Share a pass out into units; targets of one shape are batches on GPUs alone."""
    # Small batches begin, so that a GPU has something to compute while the others are read. Of the rest what takes
    # longest begins first, the others as they lie in the files.
    batches = batches_of(layout.factorised, goal, spec_of) if on_gpus else ()
    nbytes = {parameter.pair.name: parameter.pair.nbytes for parameter in layout.parameters}
    first = [_unit(batch.targets, nbytes, batch) for batch in sorted(batches, key=lambda batch: batch.numel)]
    batched = {target.path for batch in batches for target in batch.targets}
    groups = sharing([target for target in layout.factorised if target.path not in batched])
    sized = [
        (max(delta.numel for target in group for delta in target.deltas), _unit(group, nbytes)) for group in groups
    ]
    sized += _alone(layout, nbytes)
    sized.sort(key=lambda entry: -entry[0] if entry[0] >= HELD["cpu"] else 0)
    return ScanPlan(layout, goal, spec_of, (*first, *(unit for _, unit in sized)))


def _unit(targets: tuple[LowRankTarget, ...], nbytes: Mapping[str, int], batch: Batch | None = None) -> ScanUnit:
    names = tuple(dict.fromkeys(name for target in targets for name in target.names))
    return ScanUnit(names, targets, sum(nbytes[name] for name in names), batch)


def _alone(layout: ScanLayout, nbytes: Mapping[str, int]) -> Iterator[tuple[int, ScanUnit]]:
    """The tensors that are not factorised, with the elements of each: small ones together, which count as none."""
    inside = {name for target in layout.factorised for name in target.names}
    pairs = {parameter.pair.name: parameter.pair for parameter in layout.parameters}
    numel = {name: pair.numel for name, pair in pairs.items() if name not in inside}
    yield from ((size, ScanUnit((name,), (), nbytes[name])) for name, size in numel.items() if size > SMALL)
    small = [name for name, size in numel.items() if size <= SMALL]
    for at in range(0, len(small), _TOGETHER):
        names = tuple(small[at : at + _TOGETHER])
        yield 0, ScanUnit(names, (), sum(nbytes[name] for name in names))
