# SPDX-License-Identifier: Apache-2.0
"""The low-rank updates of one weight as one LoRA.

It holds the delta to represent and its rank; the factors are computed when they are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from surgery.algebra.combined_update import CombinedUpdate, Outcome, Solutions
from surgery.algebra.group import Contribution
from surgery.algebra.sums import CombineOptions, DeltaTarget, LowRankSum, Solved, merged_delta, rank_for
from surgery.algebra.ties_and_dare import DENSE_METHODS
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.tensors.computed import computed
from surgery_formats.updates import Factor, LoRA, Update, is_directed

__all__ = [
    "combine_loras",
    "common_rank",
    "computed_lora",
    "cut_direction",
    "outcome_of",
    "solved_lora",
    "stored_type",
    "target_of",
    "with_error",
]


def combine_loras(
    name: str, site: Site, contributions: Sequence[Contribution], options: CombineOptions, solutions: Solutions
) -> CombinedUpdate:
    """The LoRAs of one weight as one LoRA; a single one that need not change is taken over."""
    loras = [lora for share in contributions if (lora := share.update.low_rank())]
    target = target_of(name, loras, contributions, options)
    rank, best = common_rank((target,), options)
    if len(loras) == 1 and options.method == "exact" and rank == loras[0].rank:
        kept = loras[0].scaled(contributions[0].weight)
        return CombinedUpdate(site, (kept,), "kept", target.ranks, rank, (target,))
    return solved_lora(name, site, target, loras, rank, best, options, solutions)


def cut_direction(
    name: str, site: Site, contribution: Contribution, options: CombineOptions, solutions: Solutions
) -> CombinedUpdate:
    """A DoRA alone at its whole strength: of lower rank, with the lengths that it was trained to give.

    The factors are the best of their rank for their product. What that leaves of the weight only the base would tell.
    """
    directed = contribution.update
    assert is_directed(directed)
    alone = [replace(contribution, update=directed.direction)]
    combined = combine_loras(name, site, alone, options, solutions)
    made = tuple(directed.rebuilt(lora, directed.magnitude) for u in combined.updates if (lora := u.low_rank()))
    return replace(combined, updates=made)


def solved_lora(
    name: str,
    site: Site,
    target: DeltaTarget,
    sources: Sequence[Update],
    rank: int,
    best: tuple[float, float] | None,
    options: CombineOptions,
    solutions: Solutions,
) -> CombinedUpdate:
    """`target` as one LoRA of rank `rank`; `sources` are what it is made of, for names and types."""

    def solved() -> Solved:
        return solutions.of(name, lambda: with_error(target.solve(rank)))

    lora = computed_lora(str(site), target, rank, solved, sources)
    outcome = outcome_of(rank, target, options)
    return CombinedUpdate(site, (lora,), outcome, target.ranks, rank, (target,), best=best, solved_as=(name,))


def computed_lora(
    name: str, target: DeltaTarget, rank: int, solved: Callable[[], Solved], sources: Sequence[Update]
) -> LoRA:
    """A LoRA of scale 1 whose factors are `solved` for when they are read; no two of an adapter may have one name."""
    out, inputs = target.shape
    tensors, dtype = [tensor for source in sources for tensor in source.tensors], stored_type(sources)
    A = computed(f"{name}.A", (rank, inputs), tensors, lambda: solved().A, dtype)
    B = computed(f"{name}.B", (out, rank), tensors, lambda: solved().B, dtype)
    return LoRA(Factor.of(A), Factor.of(B), 1.0, float(rank))


def with_error(solved: Solved) -> tuple[Solved, float]:
    """Factors and what they leave out, for the memory of solutions."""
    return solved, solved.lost


def target_of(
    name: str, loras: Sequence[LoRA], contributions: Sequence[Contribution], options: CombineOptions
) -> DeltaTarget:
    """The delta that `loras`, one per contribution, are to become."""
    weights = tuple(share.weight for share in contributions)
    if options.method in DENSE_METHODS:
        return merged_delta(loras, weights, [share.owner for share in contributions], options, name)
    scaled = tuple(lora.scaled(weight) for lora, weight in zip(loras, weights, strict=True))
    return LowRankSum(scaled, options.method == "svd")


def common_rank(targets: Sequence[DeltaTarget], options: CombineOptions) -> tuple[int, tuple[float, float] | None]:
    """The rank of the result, one for all experts, and what the optimum of that rank loses where it was worked out."""
    full = max(target.full_rank for target in targets)
    rank = min(full, options.rank or full)
    if not options.by_spectrum and (rank == full or options.method in DENSE_METHODS):
        return rank, None
    sums = [target for target in targets if isinstance(target, LowRankSum)]
    if len(sums) != len(targets):  # all singular values of a dense delta would cost a full SVD
        return max(target.least(options) for target in targets), None
    spectra = [target.spectrum() for target in sums]
    rank = max(rank_for(options, spectrum, full) for spectrum in spectra)
    lost, whole = (math.sqrt(sum(float((spectrum[at:] ** 2).sum()) for spectrum in spectra)) for at in (rank, 0))
    return rank, (whole, lost)


def outcome_of(rank: int, target: DeltaTarget, options: CombineOptions) -> Outcome:
    """Whether directions may have been dropped."""
    return "approximated" if rank < target.full_rank and options.truncates else "exact"


def stored_type(sources: Sequence[Update]) -> DType:
    """Products of numbers keep float32 at least; float64 where a source has it."""
    trained = {tensor for source in sources for tensor in source.tensors if tensor not in source.untrained}
    return DType.F64 if any(tensor.dtype is DType.F64 for tensor in trained) else DType.F32
