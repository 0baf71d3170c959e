# SPDX-License-Identifier: Apache-2.0
"""Disentangled attention and the convolution behind the first layer, written from DeBERTa's papers and code."""

from __future__ import annotations

import torch

from surgery.reference.primitives import Load, activate, normalise, project
from surgery_formats.models.families.recipe import Convolution, Disentangled

__all__ = ["convolve", "distance_scores", "row_of"]


def distance_scores(record: Disentangled, q: torch.Tensor, k: torch.Tensor, load: Load) -> torch.Tensor:
    """``(B, heads, S, S)``, not scaled, of queries and keys ``(B, heads, S, head_dim)``."""
    count = q.shape[2]
    table = normalise(load(record.table), record.norm, load)
    rows_by_distance = torch.tensor([row_of(record, before) for before in range(1 - count, count)], dtype=torch.long)
    place = torch.arange(count)
    rows = table[rows_by_distance[place[:, None] - place + count - 1].reshape(-1)]  # for every pair of tokens
    scores = torch.zeros((), dtype=q.dtype)
    if record.keys is not None:
        embedded = project(rows, record.keys, load).reshape(count, count, *q.shape[1::2])
        scores = scores + torch.einsum("bhqd,qkhd->bhqk", q, embedded)
    if record.queries is not None:
        embedded = project(rows, record.queries, load).reshape(count, count, *q.shape[1::2])
        scores = scores + torch.einsum("bhkd,qkhd->bhqk", k, embedded)
    return scores


def row_of(record: Disentangled, before: int) -> int:
    """The row for a key that lies `before` its query; buckets in whole numbers."""
    bucket, half = abs(before), record.buckets // 2
    if record.buckets and bucket > half:
        steps, last = half - 1, record.max_distance - 1
        # the first n with (bucket / half) ** steps <= (last / half) ** n
        number = 1
        while number <= half and bucket**steps * half**number > last**number * half**steps:
            number += 1
        bucket = half + number
    return max(0, min((bucket if before > 0 else -bucket) + record.span, 2 * record.span - 1))


def convolve(
    record: Convolution, first: torch.Tensor, result: torch.Tensor, real: torch.Tensor, load: Load
) -> torch.Tensor:
    """``N(result + act(conv(first)))``; `real`, ``(B, S)``, tells which tokens of `first` are no padding."""
    weight, reach = load(record.weight), record.width // 2
    tokens = first * real[..., None].to(first.dtype)
    padded = torch.nn.functional.pad(tokens, (0, 0, reach, reach))
    size = first.shape[-1] // record.groups
    parts = []
    for group in range(record.groups):
        own = slice(group * size, (group + 1) * size)
        shifted = [padded[:, n : n + first.shape[1], own] @ weight[own, :, n].T for n in range(record.width)]
        parts.append(torch.stack(shifted).sum(0))
    mixed = torch.cat(parts, dim=-1) + load(record.bias)
    return normalise(result + activate(mixed, record.activation), record.norm, load)
