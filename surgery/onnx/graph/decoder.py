# SPDX-License-Identifier: Apache-2.0
"""The graph of a decoder: embedding, layers around a cache, head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from surgery.onnx.graph.altup import altup_layers
from surgery.onnx.graph.attention import cached_attention
from surgery.onnx.graph.context import CacheValues, Context, ResidualStream, module_of
from surgery.onnx.graph.dims import BATCH, PAST, SEQUENCE, TOTAL
from surgery.onnx.graph.embedding import position_table, token_rows
from surgery.onnx.graph.frame import Frame
from surgery.onnx.graph.heads import add_head
from surgery.onnx.graph.layers import Body, last_states, layer_steps
from surgery.onnx.graph.linear import linear
from surgery.onnx.graph.modules import couple
from surgery.onnx.graph.norm import norm
from surgery.onnx.graph.short_convolution import state_names
from surgery.onnx.graph.virtual_tokens import completed_mask, in_front
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import Attention, Layer, Model

__all__ = ["decoder", "embedded", "embedding_graph"]


def decoder(ctx: Context, model: Model, max_length: int) -> None:
    """Build the graph, for at most `max_length` positions.

    Inputs are ``input_ids (B, S)``, or ``inputs_embeds (B, S, width)`` with what `Context.images` needs beside them,
    ``attention_mask (B, T)`` and past keys and values ``(B, kv_heads, T - S, head_dim)``; outputs are ``logits (B, S, V)``
    and the present ``(B, kv_heads, T, head_dim)``. A model that does not generate has no cache: T is S.

    Raises:
        FitError: a tensor is missing or misshapen.
    """
    graph, caches = ctx.graph, list[CacheValues | None]()
    if ctx.virtual.embedded:
        width = model.embedding.projection.inputs if model.embedding.projection else model.hidden
        ctx.ids = graph.input("inputs_embeds", ctx.io, (BATCH, SEQUENCE, width))
    elif model.generates:
        graph.input(ctx.ids, DType.I64, (BATCH, SEQUENCE))
    else:
        ctx.per_token(ctx.ids)
    if model.generates:
        own = "own_tokens" if ctx.virtual.past else TOTAL  # virtual tokens are counted by `completed_mask`
        mask = given = graph.input("attention_mask", DType.I64, (BATCH, own))
        grid = ctx.images == "grid"
        shape = (*((3,) if grid else ()), BATCH, SEQUENCE)
        places = graph.input("position_ids", DType.I64, shape) if ctx.position_ids or grid else ""
        kept = [_cache(ctx, number, layer) for number, layer in enumerate(model.caching)]
        if ctx.virtual.past:
            mask = completed_mask(graph, ctx.ids, mask, kept[0].past_key)
        caches += [kept[number] if one is None else _read(kept[one]) for number, one in _sources(model)]
    else:
        mask, places, kept, caches = ctx.per_token("attention_mask"), "", [], [None] * len(model.layers)
        if ctx.virtual.front:
            ctx.ids, mask = in_front(graph, ctx.ids, mask, model.vocabulary, ctx.virtual.front)
        given = mask
    frame = Frame(ctx, mask, max_length, given, places)
    if ctx.images == "blocks" and ctx.virtual.embedded:
        frame.types = graph.input("token_type_ids", DType.I64, (BATCH, SEQUENCE))
    ctx.real = lambda: frame.real
    x = embedded(ctx, model, lambda: frame.positions)
    bodies = [
        _attention(ctx, layer.attention, frame, cache, number)
        for number, (layer, cache) in enumerate(zip(model.layers, caches, strict=True))
    ]
    if model.altup is not None:
        stream = ResidualStream(altup_layers(ctx, model, model.altup, x, bodies))
    else:
        stream = ResidualStream(x)
        for layer, attend in zip(model.layers, bodies, strict=True):
            stream = layer_steps(ctx, model, layer, stream, attend)
    add_head(ctx, model, last_states(ctx, model, stream))
    for layer, values in zip(model.caching, kept, strict=False):
        if layer.attention.convolution is not None:
            graph.output(values.present_key, ctx.io, _state(layer))
            continue
        shape = (BATCH, layer.attention.kv_heads, TOTAL, layer.attention.head_dim)
        graph.output(values.present_key, ctx.io, shape)
        graph.output(values.present_value, ctx.io, shape)


def embedding_graph(ctx: Context, model: Model) -> None:
    """Build the graph that makes ``inputs_embeds (B, S, width)`` of ``input_ids (B, S)``: what the decoder takes instead."""
    record = model.embedding
    ctx.graph.input(ctx.ids, DType.I64, (BATCH, SEQUENCE))
    own = record if record.scale_rounded else replace(record, scale=1.0)  # other scales belong to the decoder
    x = token_rows(ctx, replace(model, embedding=own))
    x = ctx.batched(x, "", out="inputs_embeds") if ctx.flat else ctx.graph.rename(x, "inputs_embeds")
    ctx.graph.output(x, ctx.io, (BATCH, SEQUENCE, model.embedded[0]))


def _cache(ctx: Context, number: int, layer: Layer) -> CacheValues:
    if layer.attention.convolution is not None:
        state, next_state = state_names(number)
        ctx.graph.input(state, ctx.io, _state(layer))
        return CacheValues(state, "", next_state, "")
    shape = (BATCH, layer.attention.kv_heads, PAST, layer.attention.head_dim)
    past = [ctx.graph.input(f"past_key_values.{number}.{part}", ctx.io, shape) for part in ("key", "value")]
    for name in past:
        if name in ctx.virtual.past:
            ctx.graph.initializer(name, ctx.virtual.past[name].astype(ctx.graph.numpy_type(ctx.io)))
    return CacheValues(past[0], past[1], f"present.{number}.key", f"present.{number}.value")


def _sources(model: Model) -> list[tuple[int, int | None]]:
    """Every layer's number, and that of the layer whose keys and values it takes."""
    return [(number, layer.attention.shared) for number, layer in enumerate(model.layers)]


def _read(cache: CacheValues) -> CacheValues:
    """The same past, which is given out once."""
    return CacheValues(cache.past_key, cache.past_value, "", "")


def _state(layer: Layer) -> tuple[int | str, ...]:
    own = layer.attention.convolution
    return BATCH, layer.attention.output.inputs, own.kernel if own else 0


def embedded(ctx: Context, model: Model, positions: Callable[[], str]) -> str:
    """The first hidden states; `positions` gives those of new tokens ``(B, S)``, where the model looks them up."""
    record = model.embedding
    x = token_rows(ctx, model)
    if record.projection is not None:
        x = linear(ctx, record.projection, x)
    if record.positions or record.sinusoid:
        at = module_of(record.positions) or "positions"
        table = position_table(ctx, model)
        places = positions()
        if record.position_offset:
            places = ctx.graph.node("Add", [places, ctx.graph.ints(record.position_offset)], at)
        if ctx.flat:
            places = ctx.reshaped(places, (-1,), at)
        x = ctx.graph.node("Add", [x, ctx.graph.node("Gather", [table, places], at, axis=0)], at)
    if record.norm is not None:
        x = norm(ctx, record.norm, x, model.hidden, module_of(record.norm.weight))
    for network in record.couplings:
        x = couple(ctx, network, x)
    return x


def _attention(ctx: Context, record: Attention, frame: Frame, cache: CacheValues | None, layer: int) -> Body:
    def attend(x: str, alpha: float) -> str:
        return cached_attention(ctx, record, x, frame, cache, layer=layer, alpha=alpha)

    return attend
