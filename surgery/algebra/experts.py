# SPDX-License-Identifier: Apache-2.0
"""Experts that several adapters change: each combined with its like, in the stacks of their formats."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from surgery.algebra.combined_update import CombinedUpdate, Solutions
from surgery.algebra.group import Contribution
from surgery.algebra.low_rank import common_rank, computed_lora, outcome_of, target_of, with_error
from surgery.algebra.sums import Recipe, Solved
from surgery_formats.adapters.experts import SWITCH
from surgery_formats.canonical.adapter import Site, WeightedAdapter
from surgery_formats.errors import FitError
from surgery_formats.updates import Linear, Stacked, transposed

__all__ = ["combine_stacks"]


def combine_stacks(
    name: str,
    site: Site,
    contributions: Sequence[Contribution],
    terms: Sequence[WeightedAdapter],
    recipe: Recipe,
    solutions: Solutions,
) -> CombinedUpdate:
    """Experts: each combined with its like; one rank for all, as every format has it."""
    _check_stacks(site, contributions, terms)
    first = contributions[0]
    experts = list(zip(*(share.experts for share in contributions), strict=True))
    targets = tuple(target_of(f"{name}[{e}]", loras, contributions, recipe) for e, loras in enumerate(experts))
    rank, best = common_rank(targets, recipe)
    ranks = targets[0].ranks
    if len(contributions) == 1 and recipe.method == "exact" and rank == ranks[0] and isinstance(first.update, Linear):
        return CombinedUpdate(site, (first.update.scaled(first.weight),), "kept", ranks, rank, targets)
    keys = tuple(f"{name}[{e}]" for e in range(len(targets)))

    def solved(e: int) -> Solved:
        return solutions.of(keys[e], lambda: with_error(targets[e].solve(rank)))

    loras = tuple(
        computed_lora(f"{site}.{e}", target, rank, partial(solved, e), experts[e]) for e, target in enumerate(targets)
    )
    stack = Stacked(loras, tuple(lora.transpose() for lora in loras) if transposed(first.update) else ())
    outcome = outcome_of(rank, targets[0], recipe)
    return CombinedUpdate(site, (stack,), outcome, ranks, rank, targets, best=best, solved_as=keys)


def _check_stacks(site: Site, contributions: Sequence[Contribution], terms: Sequence[WeightedAdapter]) -> None:
    if len({len(share.experts) for share in contributions}) > 1:
        raise FitError("has another number of experts in each adapter", tensor=site.path)
    for share in contributions:
        if SWITCH not in site.path and transposed(share.update) is None:
            raise FitError(
                "stacks its experts as PEFT did before 0.19, in an order of axes that only the base can tell apart",
                file=terms[share.owner].adapter.path,
                tensor=share.update.tensors[0].name,
                hint="convert it to PEFT with its base first",
            )
    if len({transposed(share.update) is None for share in contributions}) > 1:
        raise FitError("stacks its experts in two formats", tensor=site.path, hint="convert one adapter first")
