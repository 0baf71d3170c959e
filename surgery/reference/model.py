# SPDX-License-Identifier: Apache-2.0
"""From token ids to logits, layer by layer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgery.reference.attention import Mask
from surgery.reference.layers import run_layer
from surgery.reference.primitives import activate, normalise, project
from surgery.reference.weights import ReferenceWeights, planned_weights, stored_weights
from surgery_formats.errors import FitError
from surgery_formats.models.families.parameters import model_of
from surgery_formats.models.families.recipe import ClassifierHead, Embedding, HiddenHead, LanguageHead, Model

if TYPE_CHECKING:
    from surgery.engine.plan import Plan
    from surgery_formats.models.checkpoint import Component

__all__ = ["Cache", "Output", "Reference", "forward", "open_reference", "prefix_cache", "prompt_cache"]

_BLOCK = 1 << 24  # elements of the head's matrix at a time


@dataclass(frozen=True)
class Reference:
    """A model to be computed.

    Attributes:
        model: What it computes.
        weights: Its tensors.
        dtype: Precision of the arithmetic: float32, or float64.
    """

    model: Model
    weights: ReferenceWeights
    dtype: torch.dtype = torch.float32

    def load(self, name: str) -> torch.Tensor:
        """A whole tensor in that precision; exact for every type a checkpoint stores."""
        return self.weights.load(name).to(self.dtype)


@dataclass(frozen=True)
class Cache:
    """What earlier tokens left behind.

    Attributes:
        layers: Keys and values ``(B, kv_heads, P, head_dim)`` of every layer.
        real: ``(B, P)``: which of them are no padding.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    real: torch.Tensor

    def expand(self, batch: int) -> Cache:
        """The same past for `batch` rows."""
        return Cache(
            tuple((k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in self.layers),
            self.real.expand(batch, -1),
        )


@dataclass(frozen=True)
class Output:
    """What a call gave.

    Attributes:
        logits: ``(B, S, V)``, ``(B, labels)`` or ``(B, S, labels)`` by head; ``(B, S, D)``, the last hidden state, of a
            bare encoder.
        cache: Of a decoder: with the tokens of this call.
        pooled: ``(B, D)`` of an encoder with a pooler.
    """

    logits: torch.Tensor
    cache: Cache
    pooled: torch.Tensor | None = None


def open_reference(component: Component, plan: Plan | None = None, dtype: torch.dtype = torch.float32) -> Reference:
    """The reference of a checkpoint's network, or of what `plan` would make of it.

    Raises:
        FitError: no recipe for the model.
    """
    if plan is None:
        weights = stored_weights(component)
        return Reference(model_of(component.config, weights.names), weights, dtype)
    weights = planned_weights(plan, component.name)
    name = f"{component.name}/config.json" if component.name else "config.json"
    rewritten = next((file.data for file in plan.side_files if file.name == name and file.data), b"")
    config = json.loads(rewritten) if rewritten else component.config
    return Reference(model_of(config, weights.names), weights, dtype)


@torch.no_grad()
def forward(
    reference: Reference,
    ids: torch.Tensor,
    *,
    real: torch.Tensor | None = None,
    past: Cache | None = None,
    virtual: torch.Tensor | None = None,
    types: torch.Tensor | None = None,
) -> Output:
    """Compute the new tokens.

    Args:
        reference: The model.
        ids: ``(B, S)``; S may be 0 where `virtual` is given.
        real: ``(B, S)``: which tokens are no padding; None for all. Padding may stand on either side.
        past: Of earlier calls, or of a soft prompt.
        virtual: ``(n, D)``: embeddings of a soft prompt, put before the tokens of every row; the output holds them too.
        types: ``(B, S)``: token types; None for 0.

    Raises:
        FitError: an id beyond the vocabulary, a sequence longer than the position table, a tensor the weights lack.
    """
    model = reference.model
    batch = ids.shape[0]
    front = 0 if virtual is None else virtual.shape[0]
    here = torch.ones_like(ids, dtype=torch.bool) if real is None else real.bool()
    here = torch.cat((torch.ones(batch, front, dtype=torch.bool), here), dim=1)
    whole = here if past is None else torch.cat((past.real, here), dim=1)
    places = whole.long().cumsum(1) - 1
    new = places.shape[1] - here.shape[1]
    causal = model.kind == "decoder"
    positions = places[:, new:].clamp(min=0) if causal else torch.arange(here.shape[1]).expand(batch, -1)
    values = _embed(
        reference, ids, virtual, types, _rows(model.embedding, ids, here, places[:, new:], positions, front)
    )
    mask = Mask(whole, places, positions, causal)
    kept = []
    for index, layer in enumerate(model.layers):
        values, cache = run_layer(values, layer, reference.load, mask, None if past is None else past.layers[index])
        kept.append(cache)
    values = normalise(values, model.final_norm, reference.load)
    logits, pooled = _head(reference, values)
    return Output(logits, Cache(tuple(kept), whole), pooled)


def _rows(
    embedding: Embedding,
    ids: torch.Tensor,
    here: torch.Tensor,
    places: torch.Tensor,
    positions: torch.Tensor,
    front: int,
) -> torch.Tensor:
    """Rows of the position table."""
    if embedding.position_rule == "absolute":
        return positions + embedding.position_offset
    if embedding.position_rule == "mask":
        return torch.where(here, places, -1) + embedding.position_offset
    if front:  # of embeddings nobody can tell which are padding, so transformers counts them all
        return torch.arange(here.shape[1]).expand(len(ids), -1) + embedding.position_offset
    told = ids != embedding.padding_token
    return torch.where(told, told.long().cumsum(1) - 1, -1) + embedding.position_offset


def _embed(
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
    values = _lookup(reference, embedding.tokens, ids, embedding.scale, embedding.scale_rounded)
    if virtual is not None:
        values = torch.cat((virtual.to(reference.dtype).expand(len(ids), -1, -1), values), dim=1)
    if embedding.projection is not None:
        values = project(values, embedding.projection, reference.load)
    if embedding.types:
        zero = torch.zeros(values.shape[:2], dtype=torch.long)
        if types is not None:
            zero[:, values.shape[1] - ids.shape[1] :] = types
        values = values + _lookup(reference, embedding.types, zero)
    if embedding.positions:
        values = values + _lookup(reference, embedding.positions, rows)
    return normalise(values, embedding.norm, reference.load)


def _lookup(
    reference: Reference, name: str, ids: torch.Tensor, scale: float = 1.0, rounded: bool = False
) -> torch.Tensor:
    """Rows `ids` of a table, only those being read."""
    wanted, where = torch.unique(ids, return_inverse=True)
    if not len(wanted):
        width = reference.weights.load(name, 0, 1).shape[1]
        return torch.empty(*ids.shape, width, dtype=reference.dtype)
    rows = [reference.weights.load(name, row, row + 1) for row in wanted.tolist()]
    if any(len(row) != 1 for row in rows):
        raise FitError(f"row {int(wanted[-1])} is asked of a table that ends before it", tensor=name)
    table = torch.cat(rows)
    factor = torch.tensor(scale, dtype=torch.float64)
    factor = factor.to(table.dtype) if rounded else factor
    return table.to(reference.dtype)[where] * factor.to(reference.dtype)


def _head(reference: Reference, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    head, load = reference.model.head, reference.load
    if isinstance(head, HiddenHead):
        return values, None if head.pooler is None else torch.tanh(project(values[:, 0], head.pooler, load))
    if isinstance(head, ClassifierHead):
        values = values[:, 0] if head.tokens == "first" else values
        for step, activation in head.steps:
            values = activate(project(values, step, load), activation)
        return values, None
    return _logits(reference, values, head), None


def _logits(reference: Reference, values: torch.Tensor, head: LanguageHead) -> torch.Tensor:
    if head.before is not None:
        values = project(values, head.before, reference.load)
    last = head.projection
    height = max(1, _BLOCK // last.inputs)
    made = torch.cat(
        [
            values @ reference.weights.load(last.weight, start, start + height).to(reference.dtype).T
            for start in range(0, last.outputs, height)
        ],
        dim=-1,
    )
    if last.bias:
        made = made + reference.load(last.bias)
    made = made / head.divisor
    return made if head.softcap is None else head.softcap * torch.tanh(made / head.softcap)


def prompt_cache(reference: Reference, embeddings: torch.Tensor) -> Cache:
    """What a soft prompt ``(n, D)`` leaves behind (prompt tuning, arXiv:2104.08691; P-tuning, arXiv:2103.10385), for one row."""
    return forward(reference, torch.empty(1, 0, dtype=torch.long), virtual=embeddings).cache


def prefix_cache(reference: Reference, flat: torch.Tensor) -> Cache:
    """Trained keys and values (prefix tuning, arXiv:2101.00190), for one row.

    Args:
        reference: The model.
        flat: ``(n, layers * 2 * kv_heads * head_dim)``: for every token the key and the value of each layer in turn.
            Keys are taken as they are: no rotation.

    Raises:
        FitError: the width is not that of the model.
    """
    layers = reference.model.layers
    sizes = [layer.attention.kv_heads * layer.attention.head_dim for layer in layers for _ in "kv"]
    if flat.ndim != 2 or flat.shape[1] != sum(sizes):
        raise FitError(f"the prefix has the shape {tuple(flat.shape)}, the model needs (tokens, {sum(sizes)})")
    parts = torch.split(flat.to(reference.dtype), sizes, dim=1)
    made = []
    for index, layer in enumerate(layers):
        heads, dim = layer.attention.kv_heads, layer.attention.head_dim
        k, v = (part.reshape(-1, heads, dim).transpose(0, 1)[None] for part in parts[2 * index : 2 * index + 2])
        made.append((k, v))
    return Cache(tuple(made), torch.ones(1, len(flat), dtype=torch.bool))
