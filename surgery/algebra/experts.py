# SPDX-License-Identifier: Apache-2.0
"""Experts that several adapters change: each combined with its like, in the stacks of their formats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from surgery.algebra.group import Contribution
from surgery.algebra.parts import PEFT, CombinedUpdate, Solutions, common_rank, outcome_of, stored_type, wanted_of
from surgery.algebra.sums import DeltaTarget, Recipe, Solved
from surgery_formats.canonical.adapter import Site, WeightedAdapter
from surgery_formats.errors import FitError
from surgery_formats.tensors.computed import computed
from surgery_formats.updates import Factor, LoRA, Stacked

__all__ = ["stacked"]


def stacked(
    name: str,
    site: Site,
    shares: Sequence[Contribution],
    given: Sequence[WeightedAdapter],
    recipe: Recipe,
    memory: Solutions,
) -> CombinedUpdate:
    """Experts: each combined with its like; one rank for all, as every format has it."""
    stacks = [share.update for share in shares if isinstance(share.update, Stacked)]
    _check_stacks(site, shares, given)
    experts = [[stack.experts[e] for stack in stacks] for e in range(len(stacks[0].experts))]
    loras = [[one for one in column if isinstance(one, LoRA)] for column in experts]
    if any(len(column) != len(stacks) for column in loras):
        raise FitError("stacks experts that are no plain LoRAs: their sum depends on the base", tensor=site.path)
    wanted = tuple(wanted_of(f"{name}[{e}]", column, shares, recipe) for e, column in enumerate(loras))
    rank, best = common_rank(wanted, recipe)
    ranks = wanted[0].ranks
    if len(stacks) == 1 and recipe.method == "exact" and rank == ranks[0]:
        return CombinedUpdate(site, (stacks[0].scaled(shares[0].weight),), "kept", ranks, rank, wanted)
    whole = _whole_stack if stacks[0].if_transposed else _expert_by_expert
    new = whole(name, site, wanted, rank, loras[0], memory)
    return CombinedUpdate(site, (new,), outcome_of(rank, wanted[0], recipe), ranks, rank, wanted, best=best, name=name)


def _check_stacks(site: Site, shares: Sequence[Contribution], given: Sequence[WeightedAdapter]) -> None:
    stacks = [share.update for share in shares if isinstance(share.update, Stacked)]
    if len({len(stack.experts) for stack in stacks}) > 1:
        raise FitError("has another number of experts in each adapter", tensor=site.path)
    for share, stack in zip(shares, stacks, strict=True):
        adapter = given[share.owner].adapter
        if adapter.format == "peft" and not stack.if_transposed:
            raise FitError(
                "was written before PEFT 0.19, in an order of axes that only the base can tell apart",
                file=adapter.path,
                tensor=stack.tensors[0].name,
                hint="load and save it with a newer PEFT, or merge it into the base",
            )
    if len({bool(stack.if_transposed) for stack in stacks}) > 1:
        raise FitError("stacks its experts in two formats", tensor=site.path, hint="convert one adapter first")


def _whole_stack(
    name: str, site: Site, wanted: Sequence[DeltaTarget], rank: int, loras: Sequence[LoRA], memory: Solutions
) -> Stacked:
    """PEFT's two tensors for all experts: A ``(E * rank, in)``, B ``(out, rank * E)`` with the expert as the fastest axis."""
    count, (out, inputs) = len(wanted), wanted[0].shape

    def solve() -> Solved:
        found = [one.solve(rank) for one in wanted]
        B = torch.stack([one.B for one in found], dim=-1).reshape(out, -1)
        return Solved(B, torch.cat([one.A for one in found]), math.hypot(*(one.lost for one in found)))

    stem, sources, dtype = (
        f"{PEFT}{site.path}",
        [tensor for lora in loras for tensor in lora.tensors],
        stored_type(loras),
    )
    a = computed(f"{stem}.lora_A.weight", (count * rank, inputs), sources, lambda: memory.of(name, solve).A, dtype)
    b = computed(f"{stem}.lora_B.weight", (out, rank * count), sources, lambda: memory.of(name, solve).B, dtype)

    def forward(e: int) -> LoRA:
        A = Factor((a,), (rank, inputs), lambda t: t.reshape(count, rank, -1)[e])
        return LoRA(A, Factor((b,), (out, rank), lambda t: t.reshape(-1, rank, count)[:, :, e]), 1.0, float(rank))

    def backward(e: int) -> LoRA:  # the same two tensors, where the base holds its experts as (E, in, out)
        A = Factor((b,), (rank, out), lambda t: t.reshape(-1, rank, count)[:, :, e].T)
        return LoRA(A, Factor((a,), (inputs, rank), lambda t: t.reshape(count, rank, -1)[e].T), 1.0, float(rank))

    return Stacked(tuple(forward(e) for e in range(count)), tuple(backward(e) for e in range(count)))


def _expert_by_expert(
    name: str, site: Site, wanted: Sequence[DeltaTarget], rank: int, loras: Sequence[LoRA], memory: Solutions
) -> Stacked:
    """A pair of tensors for each expert, for formats that stack them in their own way."""
    sources, dtype = [tensor for lora in loras for tensor in lora.tensors], stored_type(loras)

    def one(e: int) -> LoRA:
        def solved() -> Solved:
            return memory.of(f"{name}[{e}]", lambda: wanted[e].solve(rank))

        out, inputs = wanted[e].shape
        A = computed(f"combined.{site}.{e}.down", (rank, inputs), sources, lambda: solved().A, dtype)
        B = computed(f"combined.{site}.{e}.up", (out, rank), sources, lambda: solved().B, dtype)
        return LoRA(Factor.of(A), Factor.of(B), 1.0, float(rank))

    return Stacked(tuple(one(e) for e in range(len(wanted))))
