# SPDX-License-Identifier: Apache-2.0
"""Attention with an explicit mask: all scores are computed, and those of invisible keys are removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from surgery.reference.disentangled import distance_scores
from surgery.reference.primitives import Load, normalise, project
from surgery.reference.relative import relative_bias
from surgery.reference.rotary import angles, angles_on_grid, rotate
from surgery.reference.short_convolution import convolve
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Alibi, Attention, Latent, Projection, Rope

__all__ = ["Mask", "Watch", "attend", "attend_to", "kept_of"]

Watch = Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Mask:
    """The keys that each query may see.

    Attributes:
        real: ``(B, T)``: which past and new tokens are not padding.
        places: ``(B, T)``: number of real tokens before each token; windows of decoders are counted in these, so that
            padding in between does not matter.
        positions: ``(B, S)``: positions of the new tokens.
        causal: Whether tokens see only earlier tokens and themselves.
        watch: Called by every layer in turn with what its queries pay to each key, ``(B, kv_heads, group, S, T)``; or None.
        grid: ``(3, B, S)``: places of the new tokens in time, height and width, where rotations follow them; or None.
        images: ``(B, S)``: which new tokens are of images, each of which, a run of them, sees itself; or None.
    """

    real: torch.Tensor
    places: torch.Tensor
    positions: torch.Tensor
    causal: bool
    watch: Watch | None = None
    grid: torch.Tensor | None = None
    images: torch.Tensor | None = None

    def _same_image(self) -> torch.Tensor:
        """``(B, S, T)``: whether query and key are new tokens of one image."""
        assert self.images is not None
        rows, new = self.images.shape
        numbers = torch.full((rows, self.real.shape[1]), -1)
        for row, images in enumerate(self.images.tolist()):
            number = 0
            for place, image in enumerate(images):
                number += image and not (place and images[place - 1])
                numbers[row, place - new] = number if image else -1
        return (numbers[:, -new:, None] == numbers[:, None]) & (numbers[:, -new:, None] >= 0)

    def turns(self, rope: Rope, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the new tokens ``(B, 1, S, dims / 2)``."""
        if self.grid is not None and rope.axes:
            return angles_on_grid(rope, self.grid, dtype)
        return angles(rope, self.positions, dtype)

    def allowed(self, window: int | None) -> torch.Tensor:
        """``(B, 1, S, T)``: whether the query may see the key."""
        keys, queries = self.real.shape[1], self.positions.shape[1]
        visible = self.real[:, None, :].expand(-1, queries, -1)
        if self.causal:
            order = torch.arange(keys)
            causal = order[None, :] <= order[keys - queries :, None]
            visible = visible & (causal if self.images is None else causal | self._same_image())
        if window is not None and self.causal:
            distance = self.places[:, keys - queries :, None] - self.places[:, None, :]
            visible = visible & (distance < window)
        elif window is not None:
            order = torch.arange(keys)
            visible = visible & ((order[None, :] - order[keys - queries :, None]).abs() < window)
        return visible[:, None]


def linear_bias(alibi: Alibi, places: torch.Tensor) -> torch.Tensor:
    """What is added to the scores of each key, ``(B, heads, T)``, float64."""
    slopes, keys = torch.tensor(alibi.slopes, dtype=torch.float64)[:, None], places[:, None].double()
    if alibi.rounded:
        return (slopes.bfloat16().double() * keys.bfloat16().double()).bfloat16().double() * alibi.scale
    return slopes * keys * alibi.scale


def attend(
    values: torch.Tensor,
    attention: Attention,
    load: Load,
    mask: Mask,
    past: tuple[torch.Tensor, torch.Tensor] | None,
    taken: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """``softmax(scale q k^T + mask) v``, projected, ``(B, S, D)``; and keys and values of all tokens so far.

    `past` are rotated keys, and values, of earlier tokens, ``(B, kv_heads, P, head_dim)``; `taken` those of all tokens, of the
    layer that this one takes them from.
    """
    if attention.shared is not None:
        if taken is None:
            raise FitError(f"layer {attention.shared}, whose keys and values are taken, has none")
        q = _queries(values, attention, load, mask)
        return _mixed(q, *taken, attention, load, mask.allowed(attention.window)), taken
    if attention.convolution is not None:
        return convolve(values, attention, attention.convolution, load, mask.real, past)
    q, k, v = _heads(values, attention, load)
    if attention.rope is not None:
        cos, sin = mask.turns(attention.rope, values.dtype)
        if attention.latent is None:
            q, k = (rotate(part, attention.rope, cos, sin) for part in (q, k))
        else:
            q, k = (_rotate_last(part, attention.rope, cos, sin) for part in (q, k))
    if attention.norm_after_rope:
        q, k = normalise(q, attention.q_norm, load), normalise(k, attention.k_norm, load)
    if attention.query_scale is not None:
        periods = mask.positions // attention.query_scale.period
        q = q * (1 + attention.query_scale.beta * torch.log1p(periods.to(q.dtype)))[:, None, :, None]
    if past is not None:
        k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
    added = None
    if attention.alibi is not None:
        bias = linear_bias(attention.alibi, mask.places).to(q.dtype)
        added = bias.reshape(len(bias), attention.kv_heads, attention.heads // attention.kv_heads, 1, -1)
    return _mixed(q, k, v, attention, load, mask.allowed(attention.window), added, mask.watch), (k, v)


def _queries(values: torch.Tensor, attention: Attention, load: Load, mask: Mask) -> torch.Tensor:
    """Queries alone, ``(B, heads, S, head_dim)``, normed and rotated."""
    q = project(values, attention.inputs[0], load).reshape(*values.shape[:2], attention.heads, attention.head_dim)
    q = normalise(q, attention.q_norm, load).transpose(1, 2)
    return q if attention.rope is None else rotate(q, attention.rope, *mask.turns(attention.rope, q.dtype))


def attend_to(
    values: torch.Tensor, encoded: torch.Tensor, real: torch.Tensor, attention: Attention, load: Load
) -> torch.Tensor:
    """Attention of `values` ``(B, S, D)`` to an encoder's result ``(B, E, D)``, of which `real` ``(B, E)`` is no padding."""
    q = _apart(values, attention.inputs[0], attention.heads, attention, load)
    k, v = kept_of(encoded, attention, load)
    visible = real[:, None, None].expand(-1, 1, values.shape[1], -1)
    return _mixed(q, k, v, attention, load, visible)


def kept_of(encoded: torch.Tensor, attention: Attention, load: Load) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that a layer makes of an encoder's result, ``(B, kv_heads, E, head_dim)``."""
    k, v = (_apart(encoded, part, attention.kv_heads, attention, load) for part in attention.inputs[1:])
    return k, v


def _apart(source: torch.Tensor, projection: Projection, number: int, attention: Attention, load: Load) -> torch.Tensor:
    flat = project(source, projection, load)
    return flat.reshape(*source.shape[:2], number, attention.head_dim).transpose(1, 2)


def _mixed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention: Attention,
    load: Load,
    visible: torch.Tensor,
    added: torch.Tensor | None = None,
    watch: Watch | None = None,
) -> torch.Tensor:
    """What queries ``(B, heads, S, head_dim)`` make of keys and values, projected; `visible` is ``(B, 1, S, T)``.

    `added` is a bias of the scores ``(B, kv_heads, group, S, T)``.
    """
    batch, count = q.shape[0], q.shape[2]
    group = attention.heads // attention.kv_heads
    grouped = q.reshape(batch, attention.kv_heads, group, count, attention.head_dim)
    scores = grouped @ k[:, :, None].transpose(-1, -2)
    if attention.disentangled is not None:
        scores = scores + distance_scores(attention.disentangled, q, k, load)[:, :, None]
    scores = scores * attention.scale
    if attention.bias is not None:
        bias = relative_bias(attention.bias, count, k.shape[2], load)
        scores = scores + bias.reshape(attention.kv_heads, group, count, -1)
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    if added is not None:
        scores = scores + added
    scores = torch.where(visible[:, :, None], scores, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    sinks = None
    if attention.sinks:
        sinks = load(attention.sinks).reshape(1, attention.kv_heads, group, 1, 1)
        top = torch.maximum(top, sinks)
    top = torch.where(top.isinf(), 0.0, top)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - top).exp()
    weights = weights / torch.where(total == 0, 1.0, total)  # padding that sees no key gets zeros
    if watch is not None:
        watch(weights)
    mixed = weights @ v[:, :, None]
    mixed = mixed.reshape(batch, attention.heads, count, attention.head_dim).transpose(1, 2)
    if attention.latent is not None:
        mixed = mixed[..., : attention.latent.values]
    return project(mixed.reshape(batch, count, -1), attention.output, load)


def _rotate_last(values: torch.Tensor, rope: Rope, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the last values of each head."""
    plain = values.shape[-1] - rope.dims
    return torch.cat((values[..., :plain], rotate(values[..., plain:], rope, cos, sin)), dim=-1)


def _latent_heads(
    values: torch.Tensor, attention: Attention, latent: Latent, load: Load
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_heads`; values are padded to the size of a key, as the cache of a graph has them."""
    shape = (*values.shape[:2], attention.heads, -1)
    q, compressed = (project(values, projection, load) for projection in attention.inputs)
    if latent.query is not None:
        q = project(normalise(q, latent.query_norm, load), latent.query, load)
    rank = latent.key_value.inputs
    c, r = compressed[..., :rank], compressed[..., rank:]
    expanded = project(normalise(c, latent.norm, load), latent.key_value, load).reshape(shape)
    shared = r[:, :, None].expand(-1, -1, attention.heads, -1)
    k = torch.cat((expanded[..., : latent.plain], shared), dim=-1)
    v = expanded[..., latent.plain :]
    v = torch.cat((v, v.new_zeros(*v.shape[:-1], attention.head_dim - latent.values)), dim=-1)
    return q.reshape(shape).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _heads(values: torch.Tensor, attention: Attention, load: Load) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries ``(B, heads, S, head_dim)``, keys and values ``(B, kv_heads, S, head_dim)``, normed but not rotated."""
    batch, count = values.shape[:2]
    if attention.latent is not None:
        return _latent_heads(values, attention, attention.latent, load)
    dim, heads, kv_heads = attention.head_dim, attention.heads, attention.kv_heads
    projected = [project(values, projection, load) for projection in attention.inputs]
    if attention.clip is not None:
        projected = [part.clamp(-attention.clip, attention.clip) for part in projected]
    if attention.layout == "separate":
        q, k, v = projected
    elif attention.layout == "concatenated":
        q, k, v = torch.split(projected[0], [heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    elif attention.layout == "by_group":
        groups = projected[0].reshape(batch, count, kv_heads, heads // kv_heads + 2, dim)
        q, k, v = groups[..., :-2, :], groups[..., -2, :], groups[..., -1, :]
    else:
        q, k, v = projected[0].reshape(batch, count, heads, 3, dim).unbind(3)
    if attention.q_bias:
        q = q.reshape(batch, count, -1) + load(attention.q_bias)
    if attention.v_bias:
        v = v.reshape(batch, count, -1) + load(attention.v_bias)
    if attention.norm_over == "width":
        q, k = normalise(q, attention.q_norm, load), normalise(k, attention.k_norm, load)
    q = q.reshape(batch, count, heads, dim)
    k = k.reshape(batch, count, kv_heads, dim)
    if attention.norm_over != "width" and not attention.norm_after_rope:
        per_head = attention.norm_over == "heads"
        q = normalise(q, attention.q_norm, load, heads if per_head else 0)
        k = normalise(k, attention.k_norm, load, kv_heads if per_head else 0)
    v = normalise(v.reshape(batch, count, kv_heads, dim), attention.v_norm, load)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
