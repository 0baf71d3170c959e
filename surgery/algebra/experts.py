# SPDX-License-Identifier: Apache-2.0
"""Experts that several adapters change: each combined with its like, in the stacks of their formats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from surgery.algebra.combined_update import CombinedUpdate, Solutions
from surgery.algebra.group import Contribution
from surgery.algebra.low_rank import PEFT, common_rank, outcome_of, stored_type, target_of, tensors_of
from surgery.algebra.sums import DeltaTarget, Recipe, Solved
from surgery_formats.canonical.adapter import Site, WeightedAdapter
from surgery_formats.errors import FitError
from surgery_formats.tensors.computed import computed
from surgery_formats.updates import Factor, LoRA, Stacked

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
    stacks = [share.update for share in contributions if isinstance(share.update, Stacked)]
    _check_stacks(site, contributions, terms)
    experts = [[stack.experts[e] for stack in stacks] for e in range(len(stacks[0].experts))]
    targets = tuple(target_of(f"{name}[{e}]", loras, contributions, recipe) for e, loras in enumerate(experts))
    rank, best = common_rank(targets, recipe)
    ranks = targets[0].ranks
    if len(stacks) == 1 and recipe.method == "exact" and rank == ranks[0]:
        return CombinedUpdate(site, (stacks[0].scaled(contributions[0].weight),), "kept", ranks, rank, targets)
    whole = _whole_stack if stacks[0].if_transposed else _expert_by_expert
    stack, keys = whole(name, site, targets, rank, experts[0], solutions)
    outcome = outcome_of(rank, targets[0], recipe)
    return CombinedUpdate(site, (stack,), outcome, ranks, rank, targets, best=best, solved_as=keys)


def _check_stacks(site: Site, contributions: Sequence[Contribution], terms: Sequence[WeightedAdapter]) -> None:
    stacks = [share.update for share in contributions if isinstance(share.update, Stacked)]
    if len({len(stack.experts) for stack in stacks}) > 1:
        raise FitError("has another number of experts in each adapter", tensor=site.path)
    for share, stack in zip(contributions, stacks, strict=True):
        if site.module_kind == "experts" and not stack.if_transposed:
            raise FitError(
                "stacks its experts as PEFT did before 0.19, in an order of axes that only the base can tell apart",
                file=terms[share.owner].adapter.path,
                tensor=stack.tensors[0].name,
                hint="load and save it with a newer PEFT, or merge it into the base",
            )
    if len({bool(stack.if_transposed) for stack in stacks}) > 1:
        raise FitError("stacks its experts in two formats", tensor=site.path, hint="convert one adapter first")


def _whole_stack(
    name: str, site: Site, targets: Sequence[DeltaTarget], rank: int, loras: Sequence[LoRA], solutions: Solutions
) -> tuple[Stacked, tuple[str, ...]]:
    """PEFT's two tensors for all experts: A ``(E * rank, in)``, B ``(out, rank * E)`` with the expert as the fastest axis."""
    count, (out, inputs) = len(targets), targets[0].shape

    def solve() -> tuple[Solved, float]:
        experts = [target.solve(rank) for target in targets]
        lost = math.hypot(*(expert.lost for expert in experts))
        B = torch.stack([expert.B for expert in experts], dim=-1).reshape(out, -1)
        return Solved(B, torch.cat([expert.A for expert in experts]), lost), lost

    stem, sources, dtype = f"{PEFT}{site.path}", tensors_of(loras), stored_type(loras)
    a = computed(f"{stem}.lora_A.weight", (count * rank, inputs), sources, lambda: solutions.of(name, solve).A, dtype)
    b = computed(f"{stem}.lora_B.weight", (out, rank * count), sources, lambda: solutions.of(name, solve).B, dtype)

    def forward(e: int) -> LoRA:
        A = Factor((a,), (rank, inputs), lambda t: t.reshape(count, rank, -1)[e])
        return LoRA(A, Factor((b,), (out, rank), lambda t: t.reshape(-1, rank, count)[:, :, e]), 1.0, float(rank))

    def backward(e: int) -> LoRA:  # the same two tensors, where the base holds its experts as (E, in, out)
        A = Factor((b,), (rank, out), lambda t: t.reshape(-1, rank, count)[:, :, e].T)
        return LoRA(A, Factor((a,), (inputs, rank), lambda t: t.reshape(count, rank, -1)[e].T), 1.0, float(rank))

    return Stacked(tuple(forward(e) for e in range(count)), tuple(backward(e) for e in range(count))), (name,)


def _expert_by_expert(
    name: str, site: Site, targets: Sequence[DeltaTarget], rank: int, loras: Sequence[LoRA], solutions: Solutions
) -> tuple[Stacked, tuple[str, ...]]:
    """A pair of tensors for each expert, for formats that stack them in their own way."""
    sources, dtype = tensors_of(loras), stored_type(loras)
    keys = tuple(f"{name}[{e}]" for e in range(len(targets)))

    def expert(e: int) -> LoRA:
        def solve() -> tuple[Solved, float]:
            solved = targets[e].solve(rank)
            return solved, solved.lost

        out, inputs = targets[e].shape
        A = computed(
            f"combined.{site}.{e}.down", (rank, inputs), sources, lambda: solutions.of(keys[e], solve).A, dtype
        )
        B = computed(f"combined.{site}.{e}.up", (out, rank), sources, lambda: solutions.of(keys[e], solve).B, dtype)
        return LoRA(Factor.of(A), Factor.of(B), 1.0, float(rank))

    return Stacked(tuple(expert(e) for e in range(len(targets)))), keys
