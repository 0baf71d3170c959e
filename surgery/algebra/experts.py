# SPDX-License-Identifier: Apache-2.0
"""Experts that several adapters change: each combined with its like, in the stacks of their formats."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from surgery.algebra.combined_update import CombinedUpdate, Solutions
from surgery.algebra.group import Contribution
from surgery.algebra.low_rank import common_rank, computed_lora, outcome_of, target_of, with_error
from surgery.algebra.sums import CombineOptions, Solved
from surgery_formats.adapters.experts import SWITCH
from surgery_formats.canonical.adapter import Site, WeightedAdapter
from surgery_formats.errors import FitError
from surgery_formats.updates import Stacked

__all__ = ["combine_stacks"]


def combine_stacks(
    name: str,
    site: Site,
    contributions: Sequence[Contribution],
    terms: Sequence[WeightedAdapter],
    options: CombineOptions,
    solutions: Solutions,
) -> CombinedUpdate:
    """Experts: each combined with its like; one rank for all, as every format has it."""
    stacks = [stack for share in contributions if (stack := share.stack)]
    _check_stacks(site, stacks, [terms[share.owner] for share in contributions])
    experts = list(zip(*(stack.experts for stack in stacks), strict=True))
    targets = tuple(target_of(f"{name}[{e}]", loras, contributions, options) for e, loras in enumerate(experts))
    rank, best = common_rank(targets, options)
    ranks = targets[0].ranks
    if len(stacks) == 1 and options.method == "exact" and rank == ranks[0]:
        return CombinedUpdate(site, (stacks[0].scaled(contributions[0].weight),), "kept", ranks, rank, targets)
    keys = tuple(f"{name}[{e}]" for e in range(len(targets)))

    def solved(e: int) -> Solved:
        return solutions.of(keys[e], lambda: with_error(targets[e].solve(rank)), name)

    loras = tuple(
        computed_lora(f"{site}.{e}", target, rank, partial(solved, e), experts[e]) for e, target in enumerate(targets)
    )
    stack = Stacked(loras, tuple(lora.transpose() for lora in loras) if stacks[0].if_transposed else ())
    outcome = outcome_of(rank, targets[0], options)
    return CombinedUpdate(site, (stack,), outcome, ranks, rank, targets, best=best, solved_as=keys)


def _check_stacks(site: Site, stacks: Sequence[Stacked], owners: Sequence[WeightedAdapter]) -> None:
    if len({len(stack.experts) for stack in stacks}) > 1:
        raise FitError("has another number of experts in each adapter", tensor=site.path)
    for owner, stack in zip(owners, stacks, strict=True):
        if SWITCH not in site.path and not stack.if_transposed:
            raise FitError(
                "stacks its experts in an order of axes that only the base can tell apart",
                file=owner.adapter.path,
                tensor=stack.tensors[0].name,
                hint="convert it to PEFT with its base first",
            )
    if len({bool(stack.if_transposed) for stack in stacks}) > 1:
        raise FitError("stacks its experts in two formats", tensor=site.path, hint="convert one adapter first")
