# SPDX-License-Identifier: Apache-2.0
"""Layers over several streams of hidden states: AltUp (arXiv:2301.13310), LAuReL (2411.07501), embeddings of each layer.

Streams are a list of ``(B, S, D)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from surgery.reference.attention import Mask, attend
from surgery.reference.embedding import rows_of
from surgery.reference.experts import transform
from surgery.reference.primitives import Load, activate, normalise, project
from surgery.reference.reference import Reference
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import AltUp, AltUpLayer, Layer, Projection

__all__ = ["run_streams"]

KeyValue = tuple[torch.Tensor, torch.Tensor]


def run_streams(
    reference: Reference,
    values: torch.Tensor,
    ids: torch.Tensor,
    mask: Mask,
    past: tuple[KeyValue, ...] | None,
    done: Callable[[int], None] | None,
) -> tuple[torch.Tensor, tuple[KeyValue, ...]]:
    """All layers, of the first hidden states ``(B, S, D)``; and keys and values of the layers that have their own."""
    model, load = reference.model, reference.load
    assert model.altup is not None
    inputs = _layer_inputs(reference, ids, values)
    target = _size(values)
    streams = [values, *(_resized(project(values, begin, load), target) for begin in model.altup.begins)]
    caches: list[KeyValue] = []
    for number, layer in enumerate(model.layers):
        shared = layer.attention.shared
        own = None if past is None or shared is not None else past[number]
        taken = None if shared is None else caches[shared]
        streams, cache = _layer(streams, layer, model.altup, inputs[number], load, mask, own, taken)
        if shared is None:
            caches.append(cache)
        if done is not None:
            done(number + 1)
    target = _size(streams[0])
    for number, end in enumerate(model.altup.ends, start=1):
        streams[number] = _resized(project(streams[number], end, load), target)
    return torch.stack(streams).mean(0), tuple(caches)


def _size(values: torch.Tensor) -> torch.Tensor:
    """Root mean square, ``(B, S, 1)``."""
    return values.square().mean(-1, keepdim=True).sqrt()


def _resized(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return values * target / values.square().mean(-1, keepdim=True).clamp(min=1e-5).sqrt()


def _layer_inputs(reference: Reference, ids: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
    """Each layer's embedding of the tokens, ``(B, S, width)``."""
    record, model = reference.model.embedding.per_layer, reference.model
    assert record is not None
    known = torch.where(ids < record.rows, ids, 0)
    looked_up = torch.split(rows_of(reference, record.table, known, record.scale, rounded=True), record.width, dim=-1)
    told = torch.split(project(values, record.projection, reference.load) * model.hidden**-0.5, record.width, dim=-1)
    if len(looked_up) != len(model.layers):
        raise FitError("the table does not have a part for each layer", tensor=record.table)
    return [
        (normalise(one, record.norm, reference.load) + row) / math.sqrt(2)
        for one, row in zip(told, looked_up, strict=True)
    ]


def _layer(
    streams: list[torch.Tensor],
    layer: Layer,
    altup: AltUp,
    own: torch.Tensor,
    load: Load,
    mask: Mask,
    past: KeyValue | None,
    taken: KeyValue | None,
) -> tuple[list[torch.Tensor], KeyValue]:
    record = layer.altup
    assert record is not None
    if layer.attention_branch.inserted or layer.mlp_branch.inserted:
        raise FitError("modules inserted into a model with several streams of hidden states are not supported")
    mixing = _told(streams[altup.active], record, record.predict, load)
    mixing = mixing.reshape(*mixing.shape[:-1], altup.streams, altup.streams)
    predicted = [
        stream + sum(mixing[..., number, other, None] * streams[other] for other in range(altup.streams))
        for number, stream in enumerate(streams)
    ]
    active = predicted[altup.active]
    first, second = layer.attention_branch, layer.mlp_branch
    seen = normalise(active, first.before, load)
    attended, cache = attend(seen, layer.attention, load, mask, past, taken)
    low = project(project(seen, record.laurel.first, load), record.laurel.second, load)
    laurel = seen + normalise(low, record.laurel.norm, load)
    result = (active + normalise(attended, first.after, load) + laurel) / math.sqrt(2)
    inner = transform(normalise(result, second.before, load), layer.mlp, load)
    result = result + normalise(inner, second.after, load)
    shares = 1 + _told(result, record, record.correct, load)
    corrected = [stream + shares[..., n, None] * (result - active) for n, stream in enumerate(predicted)]
    read = corrected[altup.active] * load(record.gains) if record.gains else corrected[altup.active]
    gate = activate(project(read, record.input.gate, load), record.input.activation)
    added = normalise(project(gate * own, record.input.projection, load), record.input.norm, load)
    return [corrected[0], *(stream + added for stream in corrected[1:])], cache


def _told(values: torch.Tensor, record: AltUpLayer, projection: Projection, load: Load) -> torch.Tensor:
    """Coefficients of a token's streams, by the content of one of them."""
    router = project(normalise(values, record.norm, load) / values.shape[-1], record.router, load)
    return project(torch.tanh(router), projection, load)
