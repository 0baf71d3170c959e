# SPDX-License-Identifier: Apache-2.0
"""How many directions each matrix gets.

By number, share of energy, error, a budget for all matrices, or whatever is above the rounding noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy

from surgery.engine.selection import matches
from surgery.extraction.factorise import TargetFactors
from surgery.extraction.figures import AS_AUTO, RankChoice
from surgery.extraction.storage_plan import StoragePlan, dense_size
from surgery.extraction.stream.tally import PairMeasure
from surgery.extraction.targets import LowRankTarget
from surgery.rank import Budget, Rank
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.coding import Coding
from surgery_formats.linalg.rank_criteria import allocate
from surgery_formats.text import closest, show

__all__ = ["TABLE_RANKS", "RankGoal", "magnitude_count", "rank_goal", "rank_table", "ranks_of", "table_ranks"]

DEFAULT = 16
_HEADER = 200  # bytes of a file's header that one tensor takes, at most, with names as long as they get
MOST = 256
"""Most singular values looked at where the rank is to be found (budget, auto): beyond, an adapter is no smaller than
what it replaces."""
_CODED = 6
"""Headers of a compact adapter per target: codes and scales of two factors, a line of compact.json, groups not full."""


@dataclass(frozen=True, slots=True)
class RankGoal:
    """What a choice of ranks asks of an extraction.

    Attributes:
        rank: The choice; it has a number unless something else decides.
        table: Whether to compute as many directions as the table of ranks shows.
    """

    rank: Rank
    table: bool = False

    def rank_of(self, target: LowRankTarget) -> int | None:
        """The rank that the user gave for `target`, if it was a number; the first pattern that matches wins."""
        site = Site(target.path)
        return next((rank for pattern, rank in self.rank.patterns.items() if matches(pattern, site)), self.rank.number)

    def limit(self, target: LowRankTarget) -> int | None:
        """Most directions of `target` to compute; None where its energy or error alone decides."""
        if (asked := self.rank_of(target)) is not None:
            return max(asked, *TABLE_RANKS) if self.table else asked
        size = self.rank.most_size
        if size is None:
            return MOST if self.rank.above_noise else None
        numbers = size.limit // (2 if size.measure == "bytes" else 1)
        return max(1, min(MOST, numbers // target.cost))

    def check_patterns(self, targets: Iterable[LowRankTarget]) -> None:
        """Refuse a pattern that matches nothing: it is almost certainly a typo.

        Raises:
            FitError: a pattern matches no target.
        """
        sites = [Site(target.path) for target in targets]
        for pattern in self.rank.patterns:
            if not any(matches(pattern, site) for site in sites):
                names = sorted({part for site in sites for part in site.path.split(".") if not part.isdigit()})
                raise FitError(
                    f"no module that can get factors matches '{show(pattern)}'",
                    hint=closest(pattern, names)
                    or "patterns are those of a shell, matched from any dot of a path to its end",
                )


def rank_goal(rank: Rank, *, table: bool = False) -> RankGoal:
    """What `rank` asks of an extraction; with `table` at least as many directions are computed as the table shows.

    Raises:
        FitError: no way, or more than one way to find the rank, or one that goes with no table.
    """
    choices = rank.choices
    if not choices:
        raise FitError("no size was chosen", hint="give a rank, an energy, an error, a budget, or Rank.auto")
    if rank.patterns and choices != ("rank",):
        raise FitError(f"ranks for some modules go with a rank for the others, not with {choices[1]}")
    if len(choices) > 1 and choices != ("auto", "budget"):
        raise FitError(f"rank is found in one way only; given: {', '.join(choices)}")
    for name, value in (("energy", rank.least_energy), ("error", rank.most_error)):
        if value is not None and not value < 1:
            raise FitError(f"{name} is {value:g}; it lies between 0 and 1")
    if table and not set(choices) <= {"rank", "auto"}:
        raise FitError(
            "the table of ranks needs spectra as long as it is", hint="ask for it with a rank, or with rank auto"
        )
    decided = rank.number is not None or set(choices) & {"energy", "error", "auto", "budget"}
    return RankGoal(rank if decided else replace(rank, number=DEFAULT), table)


def ranks_of(
    goal: RankGoal,
    targets: tuple[LowRankTarget, ...],
    factored: Mapping[str, TargetFactors],
    formed: Callable[[Mapping[str, int]], StoragePlan],
    dtype: DType | Coding,
    *,
    magnitudes: bool = False,
) -> dict[str, int]:
    """The rank of every target, by path.

    `factored` has the factors of the targets that changed, and `formed` plans the storage for given ranks. With
    `magnitudes`, a budget also pays for a DoRA's.

    Raises:
        FitError: the budget is too small for the dense tensors and one direction of each target.
    """
    ranks = {target.path: max(1, factored[target.path].rank) if target.path in factored else 1 for target in targets}
    asked = {target.path: goal.rank_of(target) for target in targets}
    ranks = {path: min(entry, asked[path] or entry) for path, entry in ranks.items()}
    if goal.rank.above_noise:
        ranks |= {path: max(1, *(matrix.signal for matrix in entry.matrices)) for path, entry in factored.items()}
    budget = goal.rank.most_size
    if budget is None:
        return ranks
    storage = formed(dict.fromkeys(ranks, 1))
    factors = [factored[target.path] for target in storage.targets]
    costs = [dtype.nbytes(entry.target.cost) if budget.measure == "bytes" else entry.target.cost for entry in factors]
    fixed = sum(dense_size(dense)[budget.measure == "bytes"] for dense in storage.dense_tensors)
    if budget.measure == "bytes":
        fixed += _HEADER * ((2 if isinstance(dtype, DType) else _CODED) * len(factors) + len(storage.dense_tensors) + 1)
    if magnitudes:
        fixed += sum(magnitude_count(entry.target) for entry in factors) * (4 if budget.measure == "bytes" else 1)
    return ranks | _allotted(budget, factors, ranks, costs, fixed)


def magnitude_count(target: LowRankTarget) -> int:
    """Number of magnitudes that a DoRA has beside the factors: one per row, or per column of an embedding."""
    return target.deltas[0].logical_shape[1 if target.form == "embedding" else 0]


def _allotted(
    budget: Budget, factors: list[TargetFactors], ranks: Mapping[str, int], costs: list[int], fixed: int
) -> dict[str, int]:
    if fixed + sum(costs) > budget.limit:
        raise FitError(
            f"the budget is {budget.limit:,} {budget.measure}; what is stored whole takes {fixed:,}, and one direction "
            f"of each of {len(factors)} matrices {sum(costs):,}",
            hint="raise it, or keep less: `dense=` and `allow_loss=True`",
        )
    spectra = [numpy.asarray(entry.spectrum) for entry in factors]
    most = [ranks[entry.target.path] for entry in factors]
    allocation = allocate(spectra, costs, budget.limit - fixed, least=1, most=most)
    return {entry.target.path: max(1, rank) for entry, rank in zip(factors, allocation.ranks, strict=True)}


TABLE_RANKS = (4, 8, 16, 32, 64)
_LAYERS: Mapping[str, tuple[str, ...]] = {"attention": ("attention",), "mlp": ("mlp", "expert"), "all": ()}


def rank_table(
    storage: StoragePlan,
    factored: Mapping[str, TargetFactors],
    measures: Mapping[str, PairMeasure],
    dtype: DType | Coding,
    role: Callable[[str], str],
) -> tuple[RankChoice, ...]:
    """What each rank would cost and leave, for each group of layers; spectra are known up to the largest of `TABLE_RANKS`.

    Behind them is what `Rank.auto` would take, where every direction above the noise is known. `role` tells what part of the
    base a path is (`Component.role`).
    """
    total = math.fsum(entry.energy for entry in measures.values())
    dropped = math.fsum(measures[name].energy for name in storage.dropped)
    dense = [dense_size(tensor) for tensor in storage.dense_tensors]
    dense_numbers, dense_bytes = sum(numbers for numbers, _ in dense), sum(nbytes for _, nbytes in dense)

    def choice(rank: int, layers: str, ranks: Callable[[LowRankTarget], int]) -> RankChoice:
        left, numbers = dropped, 0
        for target in storage.targets:
            entry = factored[target.path]
            if own := min(ranks(target), entry.rank):
                left += entry.residual(own)
                numbers += target.cost * own
            else:
                left += entry.energy
        residual = math.sqrt(left / total) if total else 0.0
        return RankChoice(rank, layers, residual, numbers + dense_numbers, dtype.nbytes(numbers) + dense_bytes)

    def chosen(rank: int, roles: tuple[str, ...]) -> Callable[[LowRankTarget], int]:
        return lambda target: rank if not roles or role(target.path) in roles else 0

    rows = [choice(rank, layers, chosen(rank, roles)) for rank in TABLE_RANKS for layers, roles in _LAYERS.items()]
    if known := _signals(storage, factored):
        rows.append(choice(max(known.values()), AS_AUTO, lambda target: known[target.path]))
    return tuple(rows)


def table_ranks(
    storage: StoragePlan, factored: Mapping[str, TargetFactors]
) -> Iterator[tuple[tuple[int, str], dict[str, int]]]:
    """The rows of `rank_table` that are of all layers, by rank and layers, with the rank of each target by its path."""
    entries = {target.path: factored[target.path] for target in storage.targets}
    for rank in TABLE_RANKS:
        yield (rank, "all"), {path: max(1, min(rank, entry.rank)) for path, entry in entries.items()}
    if known := _signals(storage, factored):
        yield (max(known.values()), AS_AUTO), known


def _signals(storage: StoragePlan, factored: Mapping[str, TargetFactors]) -> dict[str, int]:
    """The directions of each target above the noise; empty where those of any are not all known."""
    signals = {target.path: _signal(factored[target.path]) for target in storage.targets}
    known = {path: count for path, count in signals.items() if count is not None}
    return known if known.keys() == signals.keys() else {}


def _signal(entry: TargetFactors) -> int | None:
    """Directions above the noise, at least one; None where there may be more than were looked at."""
    complete = all(m.signal < len(m.values) or len(m.values) >= entry.target.largest_rank for m in entry.matrices)
    return max(1, *(matrix.signal for matrix in entry.matrices)) if complete else None
