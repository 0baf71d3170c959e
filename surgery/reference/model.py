# SPDX-License-Identifier: Apache-2.0
"""From token ids to logits, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from surgery.reference.altup import run_streams
from surgery.reference.attention import Mask, Watch, attend, attend_to
from surgery.reference.disentangled import convolve
from surgery.reference.embedding import embed, position_rows
from surgery.reference.experts import transform
from surgery.reference.heads import outputs_of
from surgery.reference.inserted import run_inserted
from surgery.reference.primitives import Load, convolve_time, normalise
from surgery.reference.reference import Reference
from surgery.reference.stored import stored
from surgery.reference.vision import cut_up
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import MLP, Branch, Experts, Layer

__all__ = [
    "Cache",
    "Encoded",
    "Output",
    "encode",
    "forward",
    "prompt_cache",
]


@dataclass(frozen=True)
class Cache:
    """Keys and values of earlier tokens.

    Attributes:
        layers: Keys and values ``(B, kv_heads, P, head_dim)`` of every layer.
        real: ``(B, P)``: which tokens are not padding.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    real: torch.Tensor

    def expand(self, batch: int) -> Cache:
        """Repeat the cache for `batch` rows."""
        return Cache(
            tuple((k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in self.layers),
            self.real.expand(batch, -1),
        )


@dataclass(frozen=True)
class Output:
    """The results of a call.

    Attributes:
        logits: ``(B, S, V)``, ``(B, labels)`` or ``(B, S, labels)``, depending on the head; without a head the last hidden
            state ``(B, S, D)``, of spans where they begin ``(B, S)``.
        cache: The cache of a decoder, including the tokens of this call.
        outputs: All outputs by the names that graphs have for them.
    """

    logits: torch.Tensor
    cache: Cache
    outputs: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of its input.

    Attributes:
        values: ``(B, E, D)``.
        real: ``(B, E)``: which of these are not padding.
    """

    values: torch.Tensor
    real: torch.Tensor


@torch.no_grad()
def forward(
    reference: Reference,
    ids: torch.Tensor,
    *,
    real: torch.Tensor | None = None,
    past: Cache | None = None,
    virtual: torch.Tensor | None = None,
    types: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    watch: Watch | None = None,
    encoded: Encoded | None = None,
    grid: torch.Tensor | None = None,
    images: torch.Tensor | None = None,
    done: Callable[[int], None] | None = None,
) -> Output:
    """Compute the new tokens.

    Args:
        reference: The model.
        ids: ``(B, S)``; S may be 0 with `virtual`. For a model of images ``(B, channels, height, width)``, and nothing else.
        real: ``(B, S)``: which tokens are not padding, on either side; None for all.
        past: Cache of earlier calls, or of a soft prompt.
        virtual: ``(n, D)``, or ``(B, n, D)``: embeddings of a soft prompt, placed before the tokens of every row and part of
            the output.
        types: ``(B, S)``: token types; None for 0.
        hidden: ``(B, T)``: which past and new tokens nobody sees, although they keep their positions; None for none.
        watch: Called by every layer with its attention weights, see `Mask`.
        encoded: What the layers of an encoder-decoder's decoder look at besides, see `encode`.
        grid: Places of the new tokens in time, height and width, see `Mask`.
        images: Which new tokens are of images, see `Mask`.
        done: Called behind every layer with the number of those that were run; not for a model of images.

    Raises:
        FitError: an id beyond the vocabulary, a sequence longer than the position table, or a missing tensor.
    """
    model = reference.model
    if model.embedding.patches is not None:
        return _seen(reference, ids)
    batch = ids.shape[0]
    front = 0 if virtual is None else virtual.shape[-2]
    real_new = torch.ones_like(ids, dtype=torch.bool) if real is None else real.bool()
    real_new = torch.cat((torch.ones(batch, front, dtype=torch.bool), real_new), dim=1)
    real_all = real_new if past is None else torch.cat((past.real, real_new), dim=1)
    places = real_all.long().cumsum(1) - 1
    offset = places.shape[1] - real_new.shape[1]
    causal = model.kind == "decoder"
    positions = (
        places[:, offset:].clamp(min=0) if causal else offset + torch.arange(real_new.shape[1]).expand(batch, -1)
    )
    values = embed(
        reference,
        ids,
        virtual,
        types,
        position_rows(model.embedding, ids, real_new, places[:, offset:], positions, front, offset),
    )
    mask = Mask(real_all if hidden is None else real_all & ~hidden, places, positions, causal, watch, grid, images)
    if model.altup is not None:
        if front:
            raise FitError("a model with an embedding for each layer takes no virtual tokens")
        values, caches = run_streams(reference, values, ids, mask, None if past is None else past.layers, done)
        values = normalise(values, model.final_norm, reference.load)
    else:
        values, caches = _run_layers(reference, values, mask, past, encoded, done)
    logits, outputs = outputs_of(reference, values, ids, real_new)
    return Output(logits, Cache(caches, real_all), outputs)


def _seen(reference: Reference, pixels: torch.Tensor) -> Output:
    """Compute an encoder of images ``(B, channels, height, width)``."""
    embedding = reference.model.embedding
    assert embedding.patches is not None
    values = cut_up(pixels.to(reference.dtype), embedding.patches, reference.load)
    values = normalise(values, embedding.norm, reference.load)
    everything = torch.ones(values.shape[:2], dtype=torch.bool)
    places = torch.arange(values.shape[1]).expand(len(values), -1)
    values, caches = _run_layers(reference, values, Mask(everything, places, places, causal=False), None, None)
    logits, outputs = outputs_of(reference, values, places, everything)
    return Output(logits, Cache(caches, everything), outputs)


def _run_layers(
    reference: Reference,
    values: torch.Tensor,
    mask: Mask,
    past: Cache | None,
    encoded: Encoded | None,
    done: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, tuple[tuple[torch.Tensor, torch.Tensor], ...]]:
    caches = []
    for index, layer in enumerate(reference.model.layers):
        before = None if past is None else past.layers[index]
        first = values
        values, cache = run_layer(values, layer, reference.load, mask, before, encoded)
        if index == 0 and reference.model.convolution is not None:
            real = mask.real[:, mask.real.shape[1] - values.shape[1] :]
            values = convolve(reference.model.convolution, first, values, real, reference.load)
        caches.append(cache)
        if done is not None:
            done(index + 1)
    return normalise(values, reference.model.final_norm, reference.load), tuple(caches)


@torch.no_grad()
def encode(reference: Reference, source: torch.Tensor, real: torch.Tensor | None = None) -> Encoded:
    """Run the encoder of an encoder-decoder.

    Args:
        reference: The pair, or its encoder.
        source: Token ids ``(B, E)``, or a spectrogram ``(B, bins, frames)``.
        real: ``(B, E)``: which tokens are no padding; None for all.

    Raises:
        FitError: a decoder alone; see `forward`.
    """
    if reference.model.encoder is None and reference.model.kind != "encoder":
        raise FitError("not an encoder-decoder")
    half = replace(reference, model=reference.model.encoder or reference.model)
    stem = half.model.embedding.stem
    if stem is None:
        output = forward(half, source, real=real).logits
        return Encoded(output, torch.ones_like(source, dtype=torch.bool) if real is None else real.bool())
    values = source.to(half.dtype)
    for step in stem.convolutions:
        values = convolve_time(values, step, half.load)
    values = values.transpose(1, 2) + half.load(half.model.embedding.positions)
    everything = torch.ones(values.shape[:2], dtype=torch.bool)
    places = torch.arange(values.shape[1]).expand(len(values), -1)
    values, _ = _run_layers(half, values, Mask(everything, places, places, causal=False), None, None)
    return Encoded(values, everything)


def prompt_cache(reference: Reference, embeddings: torch.Tensor) -> Cache:
    """The cache of a soft prompt ``(n, D)`` for one row (prompt tuning, arXiv:2104.08691; P-tuning, 2103.10385)."""
    return forward(reference, torch.empty(1, 0, dtype=torch.long), virtual=embeddings).cache


def _residual(
    values: torch.Tensor, added: torch.Tensor, branch: Branch, load: Load, real: torch.Tensor, at: str
) -> torch.Tensor:
    added = normalise(added, branch.after, load) * branch.multiplier
    if branch.gains:
        added = added * load(branch.gains)
    if branch.inserted:
        return run_inserted(values, added, real, branch, load)
    return normalise(stored(values + added, f"the sum behind {at}"), branch.on_sum, load)


def _end(mlp: MLP | Experts) -> str:
    """The weight, or the last of several, that leads back to the hidden states."""
    return mlp.output.weight if isinstance(mlp, MLP) else mlp.experts[-1].output.weight


def run_layer(
    values: torch.Tensor,
    layer: Layer,
    load: Load,
    mask: Mask,
    past: tuple[torch.Tensor, torch.Tensor] | None,
    encoded: Encoded | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """One layer of `values`, ``(B, S, D)``, and keys and values of all tokens so far.

    `past` are those of earlier tokens, ``(B, kv_heads, P, head_dim)``.
    """
    first, second = layer.attention_branch, layer.mlp_branch
    ends = (layer.attention.output.weight, _end(layer.mlp))
    real = mask.real[:, mask.real.shape[1] - values.shape[1] :]
    normed = normalise(values, first.before, load)
    attended, cache = attend(normed, layer.attention, load, mask, past)
    if layer.parallel:
        mlp_input = normed if second == Branch() else normalise(values, second.before, load)
        added = normalise(transform(mlp_input, layer.mlp, load), second.after, load) * second.multiplier
        summed = _residual(values, attended, first, load, real, ends[0]) + added
        return stored(summed, f"the sum behind {ends[1]}"), cache
    values = _residual(values, attended, first, load, real, ends[0])
    if layer.cross is not None:
        if encoded is None:
            raise FitError("the decoder of an encoder-decoder looks at an encoder's result")
        branch = layer.cross.branch
        seen = normalise(values, branch.before, load)
        seen = attend_to(seen, encoded.values, encoded.real, layer.cross.attention, load)
        values = _residual(values, seen, branch, load, real, layer.cross.attention.output.weight)
    transformed = transform(normalise(values, second.before, load), layer.mlp, load)
    return _residual(values, transformed, second, load, real, ends[1]), cache
