# SPDX-License-Identifier: Apache-2.0
"""From token ids to the first hidden states: rows of tables, their sum, and what follows it."""

from __future__ import annotations

import torch

from surgery.reference.inserted import couple
from surgery.reference.primitives import normalise, project
from surgery.reference.reference import Reference
from surgery.reference.stored import stored
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Embedding

__all__ = ["embed", "position_rows", "rows_of"]


def embed(
    reference: Reference,
    ids: torch.Tensor,
    virtual: torch.Tensor | None,
    types: torch.Tensor | None,
    rows: torch.Tensor,
) -> torch.Tensor:
    """The first hidden state ``(B, n + S, D)``."""
    embedding, vocabulary = reference.model.embedding, reference.model.vocabulary
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise FitError(f"a token id is beyond the vocabulary of {vocabulary}")
    values = rows_of(reference, embedding.tokens, ids, embedding.scale, embedding.scale_rounded)
    if virtual is not None:
        values = torch.cat((virtual.to(reference.dtype).expand(len(ids), -1, -1), values), dim=1)
    values = _widened(reference, values, "tokens")
    if embedding.types:
        zero = torch.zeros(values.shape[:2], dtype=torch.long)
        if types is not None:
            zero[:, values.shape[1] - ids.shape[1] :] = types
        values = values + rows_of(reference, embedding.types, zero)
    if embedding.positions:
        values = values + rows_of(reference, embedding.positions, rows)
    if embedding.sinusoid:
        values = values + _sinusoid(rows, values.shape[-1], values.dtype)
    values = _widened(reference, values, "sum")
    values = normalise(values, embedding.norm, reference.load)
    values = _widened(reference, values, "norm")
    for network in embedding.couplings:
        values = couple(values, network, reference.load)
    return values


def _widened(reference: Reference, values: torch.Tensor, done: str) -> torch.Tensor:
    """Projected to the width of the layers, if that is what follows the step `done`."""
    embedding = reference.model.embedding
    if embedding.projection is None or embedding.projected != done:
        return values
    return project(values, embedding.projection, reference.load)


def rows_of(
    reference: Reference, name: str, ids: torch.Tensor, scale: float = 1.0, rounded: bool = False
) -> torch.Tensor:
    """Look up rows `ids` of a table, reading only those rows."""
    unique_ids, index = torch.unique(ids, return_inverse=True)
    if not len(unique_ids):
        width = reference.weights.load(name, 0, 1).shape[1]
        return torch.empty(*ids.shape, width, dtype=reference.dtype)
    rows = [reference.weights.load(name, row, row + 1) for row in unique_ids.tolist()]
    if any(len(row) != 1 for row in rows):
        raise FitError(f"the table has no row {int(unique_ids[-1])}", tensor=name)
    table = torch.cat(rows)
    factor = torch.tensor(scale, dtype=torch.float64)
    factor = factor.to(table.dtype) if rounded else factor
    return stored(table.to(reference.dtype)[index] * factor.to(reference.dtype), f"rows of {name}")


def _sinusoid(rows: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Sines, then cosines, of the positions `rows`, slower from pair to pair (arXiv:1706.03762 section 3.5)."""
    pairs = torch.arange(width, dtype=torch.float64)
    turns = rows[..., None].double() / 10000 ** (2 * (pairs // 2) / width)
    return torch.cat((turns[..., 0::2].sin(), turns[..., 1::2].cos()), dim=-1).to(dtype)


def position_rows(
    embedding: Embedding,
    ids: torch.Tensor,
    real_new: torch.Tensor,
    places: torch.Tensor,
    positions: torch.Tensor,
    front: int,
    past: int = 0,
) -> torch.Tensor:
    """Rows of the position table, ``(B, n + S)``, of the new tokens, `front` of which are virtual, behind `past` others."""
    if embedding.position_rule == "absolute":
        return positions + embedding.position_offset
    if embedding.position_rule == "mask":
        return torch.where(real_new, places, -1) + embedding.position_offset
    if front:  # padding among embeddings cannot be recognised, so transformers counts them all
        return torch.arange(real_new.shape[1]).expand(len(ids), -1) + embedding.position_offset
    is_token = ids != embedding.padding_token
    return torch.where(is_token, past + is_token.long().cumsum(1) - 1, -1) + embedding.position_offset
