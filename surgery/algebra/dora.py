# SPDX-License-Identifier: Apache-2.0
"""What a DoRA adds to its weight, which only the base tells: ``m / ||W + s B A|| * (W + s B A) - W``, dense and of full rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from surgery.algebra.group import Contribution
from surgery.algebra.parts import CombinedUpdate, Solutions, common_rank, factors_of
from surgery.algebra.sums import MergedDelta, Recipe
from surgery.algebra.task_vectors import DENSE_METHODS
from surgery_formats.adapters.writing import places_of, whole_place
from surgery_formats.canonical.adapter import Site
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.storage.parameter import Parameter
from surgery_formats.updates import DoRA, LoRA
from surgery_formats.updates.weights import HeldWeight

__all__ = ["DoraTerm", "with_dora"]


@dataclass(frozen=True)
class DoraTerm:
    """A term of a sum.

    Attributes:
        update: The DoRA.
        weight: Of the base.
    """

    update: DoRA
    weight: Parameter

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.update.shape

    @property
    def rank(self) -> int:
        """Of its direction; what it adds has more."""
        return self.update.rank

    def delta(self, dtype: torch.dtype) -> torch.Tensor:
        """What it adds, dense."""
        values = self.weight.get(dtype).contiguous()
        apply = self.update.prepare(HeldWeight(values))
        return apply(values.clone(), range(self.shape[0]), range(self.shape[1])) - values


def with_dora(
    name: str, site: Site, shares: Sequence[Contribution], base: Checkpoint, recipe: Recipe, memory: Solutions
) -> CombinedUpdate | None:
    """LoRAs and DoRAs of one weight as one LoRA, the best of its rank; None if the base holds the weight in pieces.

    Args:
        name: Of the weight.
        site: Where.
        shares: All of them LoRAs or DoRAs.
        base: Their base.
        recipe: It says a rank, or how to find one.
        memory: Of the whole combination.
    """
    updates = [share.update for share in shares if isinstance(share.update, LoRA | DoRA)]
    places = places_of(site, base, updates[0].tensors)
    if whole_place(places) is None:
        return None
    weight = places[0].parameter
    terms = tuple(DoraTerm(update, weight) if isinstance(update, DoRA) else update for update in updates)
    dense = (
        recipe if recipe.method in DENSE_METHODS else replace(recipe, method="dare-linear", density=1.0)
    )  # nothing drops: a sum
    wanted = MergedDelta(
        terms, tuple(share.weight for share in shares), tuple(share.owner for share in shares), dense, name
    )
    rank, best = common_rank((wanted,), dense)
    loras = [update.direction if isinstance(update, DoRA) else update for update in updates]
    return factors_of(name, site, wanted, loras, rank, best, recipe, memory)
