# SPDX-License-Identifier: Apache-2.0
"""Relative positions as a bias of the scores, written from the paper (arXiv:1910.10683), buckets in whole numbers."""

from __future__ import annotations

import torch

from surgery.reference.primitives import Load
from surgery_formats.models.families.recipe import RelativeBias

__all__ = ["relative_bias"]


def relative_bias(record: RelativeBias, queries: int, keys: int, load: Load) -> torch.Tensor:
    """``(heads, queries, keys)``: the last `queries` of `keys` tokens look at all of them."""
    numbers = torch.tensor(
        [[_bucket(record, key - query) for key in range(keys)] for query in range(keys - queries, keys)],
        dtype=torch.long,
    )
    return load(record.table)[numbers].permute(2, 0, 1)


def _bucket(record: RelativeBias, distance: int) -> int:
    """The bucket of a key that lies `distance` behind its query."""
    size = record.buckets // 2 if record.both_ways else record.buckets
    first = size if record.both_ways and distance > 0 else 0
    steps = abs(distance) if record.both_ways else max(-distance, 0)
    exact = size // 2
    if steps < exact:
        return first + steps
    # the last step n of `wide` with (steps / exact) >= (max_distance / exact) ** (n / wide)
    wide, number = size - exact, 0
    while (
        number < wide - 1 and steps**wide * exact ** (number + 1) >= record.max_distance ** (number + 1) * exact**wide
    ):
        number += 1
    return first + exact + number
