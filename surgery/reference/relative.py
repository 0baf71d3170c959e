# SPDX-License-Identifier: Apache-2.0
"""What the distance of query and key adds to the scores, with the buckets of the original implementations."""

from __future__ import annotations

import math

import torch

from surgery.reference.primitives import Load
from surgery_formats.models.families.recipe import RelativeBias

__all__ = ["relative_bias"]


def relative_bias(record: RelativeBias, behind: torch.Tensor, load: Load) -> torch.Tensor:
    """``(heads, S, T)`` for keys that lie `behind`, ``(S, T)``, the query."""
    return load(record.table)[_buckets(record, -behind)].permute(2, 0, 1)


def _buckets(record: RelativeBias, before: torch.Tensor) -> torch.Tensor:
    """Bucket of keys `before` the query; in float32, as T5's authors compute it."""
    count, offset = record.buckets, torch.zeros_like(before)
    if record.bidirectional:
        count //= 2
        offset = (before < 0).long() * count
        before = before.abs()
    before = before.clamp(min=0)
    exact = count // 2
    share = torch.log(before.float() / exact) / math.log(record.max_distance / exact)
    far = torch.where(before < exact, 0, exact + (share * (count - exact)).long())
    return offset + torch.where(before < exact, before, far.clamp(max=count - 1))
