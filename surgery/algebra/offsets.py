# SPDX-License-Identifier: Apache-2.0
"""Differences stored in full, added up: biases of ``lora_bias``, LyCORIS ``diff``.

They have no rank, and lose nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from surgery.algebra.combined_update import CombinedUpdate
from surgery.algebra.group import Contribution
from surgery.algebra.sums import Recipe
from surgery.algebra.ties_and_dare import DENSE_METHODS, merge_deltas
from surgery_formats.canonical.adapter import Site
from surgery_formats.tensors.computed import computed
from surgery_formats.updates import Factor, Offset, in_full

__all__ = ["combine_offsets"]


def combine_offsets(name: str, site: Site, contributions: Sequence[Contribution], recipe: Recipe) -> CombinedUpdate:
    """The offsets of one bias or weight as one."""
    offsets = [offset for share in contributions if (offset := in_full(share.update))]
    weights = [share.weight for share in contributions]
    if len(offsets) == 1 and recipe.method not in DENSE_METHODS:
        return CombinedUpdate(site, (offsets[0].scaled(weights[0]),), "kept")

    def vector() -> torch.Tensor:
        if recipe.method not in DENSE_METHODS:
            return torch.stack([_value(o) * w for o, w in zip(offsets, weights, strict=True)]).sum(0)
        return merge_deltas(
            [partial(_value, offset) for offset in offsets],
            weights,
            method=recipe.method,
            density=recipe.density,
            seed=recipe.seed,
            name=name,
            owners=[share.owner for share in contributions],
        )

    tensors = [tensor for offset in offsets for tensor in offset.tensors]
    tensor = computed(f"combined.{site}", offsets[0].value.shape, tensors, vector)
    return CombinedUpdate(site, (Offset(Factor.of(tensor)),), "exact", vector=vector)


def _value(offset: Offset) -> torch.Tensor:
    return offset.value.load(torch.float64) * offset.scale
