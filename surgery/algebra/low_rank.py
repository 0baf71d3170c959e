# SPDX-License-Identifier: Apache-2.0
"""The low-rank updates of one weight as one LoRA: the delta it is to stand for, its rank, and factors solved for when they are read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from surgery.algebra.combined_update import CombinedUpdate, Outcome, Solutions
from surgery.algebra.group import Contribution
from surgery.algebra.sums import DeltaTarget, LowRankSum, MergedDelta, Recipe, Solved, rank_for
from surgery.algebra.task_vectors import DENSE_METHODS
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.computed import computed
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates import Factor, LoRA, Update

__all__ = ["combine_loras", "common_rank", "outcome_of", "solved_lora", "stored_type", "target_of", "tensors_of"]

PEFT = "base_model.model."
"""Before every key of PEFT's."""


def combine_loras(
    name: str, site: Site, contributions: Sequence[Contribution], recipe: Recipe, solutions: Solutions
) -> CombinedUpdate:
    """The LoRAs of one weight as one LoRA; a single one that need not change is taken over."""
    loras = [share.update for share in contributions if isinstance(share.update, LoRA)]
    target = target_of(name, loras, contributions, recipe)
    rank, best = common_rank((target,), recipe)
    if len(loras) == 1 and recipe.method == "exact" and rank == loras[0].rank:
        kept = loras[0].scaled(contributions[0].weight)
        return CombinedUpdate(site, (kept,), "kept", target.ranks, rank, (target,))
    return solved_lora(name, site, target, loras, rank, best, recipe, solutions)


def solved_lora(
    name: str,
    site: Site,
    target: DeltaTarget,
    sources: Sequence[Update],
    rank: int,
    best: tuple[float, float] | None,
    recipe: Recipe,
    solutions: Solutions,
) -> CombinedUpdate:
    """`target` as one LoRA of rank `rank`; `sources` are what it is made of, for names and types."""

    def solved() -> Solved:
        return solutions.of(name, lambda: _with_error(target.solve(rank)))

    out, inputs = target.shape
    stem, (down, up) = _names(site, sources)
    tensors, dtype = tensors_of(sources), stored_type(sources)
    A = computed(f"{stem}.{down}", (rank, *_kernel(sources)), tensors, lambda: solved().A, dtype)
    B = computed(f"{stem}.{up}", (out, rank), tensors, lambda: solved().B, dtype)
    lora = LoRA(Factor((A,), (rank, inputs)), Factor.of(B), 1.0, float(rank))
    outcome = outcome_of(rank, target, recipe)
    return CombinedUpdate(site, (lora,), outcome, target.ranks, rank, (target,), best=best, solved_as=(name,))


def _with_error(solved: Solved) -> tuple[Solved, float]:
    return solved, solved.lost


def target_of(name: str, loras: Sequence[LoRA], contributions: Sequence[Contribution], recipe: Recipe) -> DeltaTarget:
    """The delta that `loras`, one per contribution, are to become."""
    weights = tuple(share.weight for share in contributions)
    if recipe.method in DENSE_METHODS:
        return MergedDelta(tuple(loras), weights, tuple(share.owner for share in contributions), recipe, name)
    scaled = tuple(lora.scaled(weight) for lora, weight in zip(loras, weights, strict=True))
    return LowRankSum(scaled, recipe.method == "svd")


def common_rank(targets: Sequence[DeltaTarget], recipe: Recipe) -> tuple[int, tuple[float, float] | None]:
    """The rank of the result, one for all experts, and what the optimum of that rank loses where it was worked out."""
    full = max(target.full_rank for target in targets)
    rank = min(full, recipe.rank or full)
    if not recipe.by_spectrum and (rank == full or recipe.method in DENSE_METHODS):
        return rank, None
    sums = [target for target in targets if isinstance(target, LowRankSum)]
    if len(sums) != len(targets):  # all singular values of a dense delta would cost a full SVD
        return max(target.least(recipe) for target in targets), None
    spectra = [target.spectrum() for target in sums]
    rank = max(rank_for(recipe, spectrum, full) for spectrum in spectra)
    lost, whole = (math.sqrt(sum(float(spectrum[at:].square().sum()) for spectrum in spectra)) for at in (rank, 0))
    return rank, (whole, lost)


def outcome_of(rank: int, target: DeltaTarget, recipe: Recipe) -> Outcome:
    """Whether directions may have been dropped."""
    return "approximated" if rank < target.full_rank and recipe.truncates else "exact"


def _names(site: Site, sources: Sequence[Update]) -> tuple[str, tuple[str, str]]:
    """Key and leaves of A and B: PEFT's where the sources have PEFT's, since its writer goes by them; else names that mean nothing."""
    names = [tensor.name for source in sources for tensor in source.tensors]
    if any(".base_layer." in name for name in names):
        raise FitError(
            "is inside a wrapped attention module, whose LoRA PEFT applies twice: its combination cannot be written safely",
            tensor=names[0],
            hint="merge it into the base instead",
        )
    stem = f"{PEFT}{site.path.removesuffix('.weight')}"
    if any(".lora_embedding_" in name for name in names):
        return stem, ("lora_embedding_B", "lora_embedding_A")  # PEFT's delta is (B A)^T there
    if any(".lora_A" in name for name in names):
        return stem, ("lora_A.weight", "lora_B.weight")
    return f"combined.{site}", ("down", "up")


def _kernel(sources: Sequence[Update]) -> tuple[int, ...]:
    """``(in,)``, or ``(in, k, k)`` of a convolution, as any of the sources stores it."""
    factors = [factor for source in sources if (factor := source.factors().get("A"))]
    stored = [factor.tensors[0].shape[1:] for factor in factors if factor.view is None]
    return next((shape for shape in stored if len(shape) > 1), (sources[0].shape[1],))


def tensors_of(sources: Sequence[Update]) -> list[Tensor]:
    """What is stored of all sources."""
    return [tensor for source in sources for tensor in source.tensors]


def stored_type(sources: Sequence[Update]) -> DType:
    """Products of numbers keep float32 at least; float64 where a source has it."""
    trained = {tensor for source in sources for tensor in source.tensors if tensor not in source.untrained}
    return DType.F64 if any(tensor.dtype is DType.F64 for tensor in trained) else DType.F32
