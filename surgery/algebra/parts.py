# SPDX-License-Identifier: Apache-2.0
"""What several adapters do to one weight, as one update whose factors are computed when they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from surgery.algebra.group import Contribution
from surgery.algebra.sums import DeltaTarget, LowRankSum, MergedDelta, Recipe, Solved, rank_for
from surgery.algebra.task_vectors import DENSE_METHODS, merge_deltas
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.computed import computed
from surgery_formats.updates import Factor, LoRA, Offset, Update

__all__ = [
    "PEFT",
    "CombinedUpdate",
    "Solutions",
    "common_rank",
    "factors_of",
    "low_rank",
    "offset",
    "outcome_of",
    "stored_type",
    "wanted_of",
]

Outcome = Literal["exact", "approximated", "kept"]

PEFT = "base_model.model."
"""Before every key of PEFT's."""
_REMEMBERED = 4  # solved weights: the two factors of one lie next to each other in every file


@dataclass(frozen=True)
class CombinedUpdate:
    """The combination of one weight.

    Attributes:
        site: As the first adapter that touches it spells it.
        updates: The result, for a writer.
        outcome: Nothing lost, directions dropped, or taken over as it was.
        ranks: Of the low-rank terms that went in.
        rank: Of the result; 0 if it is not low-rank.
        wanted: What the result is to be: one per expert, one otherwise; empty if it is not low-rank.
        vector: A bias's delta, where the part is one.
        best: ``(norm, residual)`` of the optimum of this rank, added in squares over `wanted`; None if it was not worked out.
        name: Under which `Solutions` knows it.
    """

    site: Site
    updates: tuple[Update, ...]
    outcome: Outcome
    ranks: tuple[int, ...] = ()
    rank: int = 0
    wanted: tuple[DeltaTarget, ...] = ()
    vector: Callable[[], torch.Tensor] | None = None
    best: tuple[float, float] | None = None
    name: str = ""


class Solutions:
    """The factors worked out last: a weight's A and B are read one after the other, and are worth one decomposition, not two.

    Attributes:
        lost: By weight, what its factors leave out; kept for all of them, for the proof.
    """

    def __init__(self) -> None:
        self._found: dict[str, Solved] = {}
        self.lost: dict[str, float] = {}

    def of(self, name: str, solve: Callable[[], Solved]) -> Solved:
        """What `solve` returned for `name`, if it is still known; else what it returns now."""
        if name not in self._found:
            while len(self._found) >= _REMEMBERED:
                self._found.pop(next(iter(self._found)))
            self._found[name] = solve()
            self.lost[name] = self._found[name].lost
        return self._found[name]

    def loss(self, part: CombinedUpdate) -> float:
        """What the factors of `part` leave out, all experts together."""
        names = [part.name, *(f"{part.name}[{e}]" for e in range(len(part.wanted)))]
        return math.hypot(*(self.lost[name] for name in names if name in self.lost))


def low_rank(
    name: str, site: Site, shares: Sequence[Contribution], recipe: Recipe, memory: Solutions
) -> CombinedUpdate:
    """The LoRAs of one weight as one LoRA."""
    loras = [share.update for share in shares if isinstance(share.update, LoRA)]
    wanted = wanted_of(name, loras, shares, recipe)
    rank, best = common_rank((wanted,), recipe)
    if len(loras) == 1 and recipe.method == "exact" and rank == loras[0].rank:
        return CombinedUpdate(site, (loras[0].scaled(shares[0].weight),), "kept", wanted.ranks, rank, (wanted,))
    return factors_of(name, site, wanted, loras, rank, best, recipe, memory)


def factors_of(
    name: str,
    site: Site,
    wanted: DeltaTarget,
    loras: Sequence[LoRA],
    rank: int,
    best: tuple[float, float] | None,
    recipe: Recipe,
    memory: Solutions,
) -> CombinedUpdate:
    """`wanted` as one LoRA whose factors are solved for when they are written; `loras` are the sources, for names and types."""

    def solved() -> Solved:
        return memory.of(name, lambda: wanted.solve(rank))

    out, inputs = wanted.shape
    stem, (down, up) = _names(site, loras)
    sources, dtype = [tensor for lora in loras for tensor in lora.tensors], stored_type(loras)
    A = computed(f"{stem}.{down}", (rank, *_kernel(loras)), sources, lambda: solved().A, dtype)
    B = computed(f"{stem}.{up}", (out, rank), sources, lambda: solved().B, dtype)
    new = LoRA(Factor((A,), (rank, inputs)), Factor.of(B), 1.0, float(rank))
    return CombinedUpdate(
        site, (new,), outcome_of(rank, wanted, recipe), wanted.ranks, rank, (wanted,), best=best, name=name
    )


def wanted_of(name: str, loras: Sequence[LoRA], shares: Sequence[Contribution], recipe: Recipe) -> DeltaTarget:
    """The delta that `loras`, one per share, are to become."""
    weights = tuple(share.weight for share in shares)
    if recipe.method in DENSE_METHODS:
        return MergedDelta(tuple(loras), weights, tuple(share.owner for share in shares), recipe, name)
    scaled = tuple(lora.scaled(weight) for lora, weight in zip(loras, weights, strict=True))
    return LowRankSum(scaled, recipe.method == "svd")


def common_rank(wanted: Sequence[DeltaTarget], recipe: Recipe) -> tuple[int, tuple[float, float] | None]:
    """The rank of the result, one for all experts, and what the optimum of that rank loses where it was worked out."""
    full = max(one.full_rank for one in wanted)
    rank = min(full, recipe.rank or full)
    if not recipe.by_spectrum and (rank == full or recipe.method in DENSE_METHODS):
        return rank, None
    sums = [one for one in wanted if isinstance(one, LowRankSum)]
    if len(sums) != len(wanted):  # all singular values of a dense delta would cost a full SVD
        return max(one.least(recipe) for one in wanted), None
    spectra = [one.spectrum() for one in sums]
    rank = max(rank_for(recipe, one, full) for one in spectra)
    lost, whole = (math.sqrt(sum(float(one[at:].square().sum()) for one in spectra)) for at in (rank, 0))
    return rank, (whole, lost)


def outcome_of(rank: int, wanted: DeltaTarget, recipe: Recipe) -> Outcome:
    """Whether directions may have been dropped."""
    return "approximated" if rank < wanted.full_rank and recipe.truncates else "exact"


def _names(site: Site, loras: Sequence[LoRA]) -> tuple[str, tuple[str, str]]:
    """Key and leaves of A and B: PEFT's where the sources have PEFT's, since its writer goes by them; else names that mean nothing."""
    names = [tensor.name for lora in loras for tensor in lora.tensors]
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


def _kernel(loras: Sequence[LoRA]) -> tuple[int, ...]:
    """``(in,)``, or ``(in, k, k)`` of a convolution, as any of the sources stores it."""
    stored = [lora.A.tensors[0].shape[1:] for lora in loras if lora.A.view is None]
    return next((shape for shape in stored if len(shape) > 1), (loras[0].shape[1],))


def stored_type(loras: Sequence[LoRA]) -> DType:
    """Products of numbers keep float32 at least; float64 where a source has it."""
    stored = {tensor.dtype for lora in loras for tensor in (*lora.A.tensors, *lora.B.tensors)}
    return DType.F64 if DType.F64 in stored else DType.F32


def offset(name: str, site: Site, shares: Sequence[Contribution], recipe: Recipe) -> CombinedUpdate:
    """Differences stored in full: biases of ``lora_bias``, LyCORIS ``diff``. They have no rank, and lose nothing."""
    offsets = [share.update for share in shares if isinstance(share.update, Offset)]
    if len(offsets) == 1 and recipe.method not in DENSE_METHODS:
        return CombinedUpdate(site, (offsets[0].scaled(shares[0].weight),), "kept")

    def value(offset: Offset) -> torch.Tensor:
        return offset.value.load(torch.float64) * offset.scale

    def vector() -> torch.Tensor:
        weights = [share.weight for share in shares]
        if recipe.method not in DENSE_METHODS:
            return torch.stack([value(o) * w for o, w in zip(offsets, weights, strict=True)]).sum(0)
        return merge_deltas(
            [partial(value, offset) for offset in offsets],
            weights,
            method=recipe.method,
            density=recipe.density,
            seed=recipe.seed,
            name=name,
            owners=[share.owner for share in shares],
        )

    tensor = computed(
        f"combined.{site}", offsets[0].value.shape, [tensor for offset in offsets for tensor in offset.tensors], vector
    )
    return CombinedUpdate(site, (Offset(Factor.of(tensor)),), "exact", vector=vector)
