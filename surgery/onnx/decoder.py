# SPDX-License-Identifier: Apache-2.0
"""The graph of a decoder: embedding, layers around a cache, head."""

from __future__ import annotations

from collections.abc import Callable

from surgery.onnx.attention import Cache, cached_attention
from surgery.onnx.context import Context, Stream, module_of
from surgery.onnx.embedding import token_rows
from surgery.onnx.frame import Frame
from surgery.onnx.heads import language_head
from surgery.onnx.linear import linear
from surgery.onnx.mlp import mlp
from surgery.onnx.norm import norm, residual_norm
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.families.recipe import Branch, LanguageHead, Layer, Model

__all__ = ["decoder"]


def decoder(ctx: Context, model: Model, max_length: int) -> None:
    """Build all of it.

    Inputs ``input_ids (B, S)``, ``attention_mask (B, T)`` and past keys and values ``(B, kv_heads, T - S, head_dim)``; outputs ``logits
    (B, S, V)`` and present ones ``(B, kv_heads, T, head_dim)``.

    Args:
        ctx: An empty graph.
        model: What to build.
        max_length: Positions to reach to.

    Raises:
        FitError: a tensor is missing or misshapen.
    """
    if not isinstance(model.head, LanguageHead):
        raise FitError("a decoder with a head for another task than language modelling", file="config.json")
    graph = ctx.graph
    graph.input(ctx.ids, DType.I64, ("batch", "sequence"))
    graph.input("attention_mask", DType.I64, ("batch", "total_sequence"))
    caches = [_cache(ctx, number, layer) for number, layer in enumerate(model.layers)]
    frame = Frame(ctx, "attention_mask", max_length)
    stream = Stream(_embedded(ctx, model, frame, max_length))
    for layer, cache in zip(model.layers, caches, strict=True):
        stream = _layer(ctx, model, layer, stream, frame, cache)
    if model.final_norm is not None:
        x, _ = residual_norm(ctx, model.final_norm, stream, model.hidden, module_of(model.final_norm.weight) or "norm")
    else:
        x = ctx.settled(stream, "")
    language_head(ctx, model.head, x)
    for layer, cache in zip(model.layers, caches, strict=True):
        shape = ("batch", layer.attention.kv_heads, "present_sequence", layer.attention.head_dim)
        graph.output(cache.present_key, ctx.io, shape)
        graph.output(cache.present_value, ctx.io, shape)


def _cache(ctx: Context, number: int, layer: Layer) -> Cache:
    shape = ("batch", layer.attention.kv_heads, "past_sequence", layer.attention.head_dim)
    past = [ctx.graph.input(f"past_key_values.{number}.{part}", ctx.io, shape) for part in ("key", "value")]
    return Cache(past[0], past[1], f"present.{number}.key", f"present.{number}.value")


def _embedded(ctx: Context, model: Model, frame: Frame, max_length: int) -> str:
    record = model.embedding
    x = token_rows(ctx, model)
    if record.projection is not None:
        x = linear(ctx, record.projection, x)
    if record.positions:
        at = module_of(record.positions)
        table = ctx.weights.value(record.positions, (model.max_positions + record.position_offset, model.hidden))
        places = frame.positions
        if record.position_offset:
            places = ctx.graph.node("Add", [places, ctx.graph.ints(record.position_offset)], at)
        if ctx.flat:
            places = ctx.reshaped(places, (-1,), at)
        x = ctx.graph.node("Add", [x, ctx.graph.node("Gather", [table, places], at, axis=0)], at)
    if record.norm is not None:
        x = norm(ctx, record.norm, x, model.hidden, module_of(record.norm.weight))
    return x


def _layer(ctx: Context, model: Model, layer: Layer, stream: Stream, frame: Frame, cache: Cache) -> Stream:
    def attend(x: str, alpha: float) -> str:
        return cached_attention(ctx, layer.attention, x, frame, cache, alpha=alpha)

    def think(x: str, alpha: float) -> str:
        return mlp(ctx, layer.mlp, x, alpha=alpha)

    at = module_of(module_of(module_of(layer.attention.output.weight)))
    if layer.parallel:
        return _parallel(ctx, model, layer, stream, attend, think, at)
    stream = _branch(ctx, model, layer.attention_branch, stream, attend, at)
    return _branch(ctx, model, layer.mlp_branch, stream, think, at)


Body = Callable[[str, float], str]


def _branch(ctx: Context, model: Model, branch: Branch, stream: Stream, body: Body, at: str) -> Stream:
    """``x + multiplier * after(body(before(x)))``, then `on_sum`; the sum is left to whoever reads it."""
    x, stream = _before(ctx, model, branch, stream, at)
    stream = Stream(stream.value, _after(ctx, model, branch, body, x, at))
    if branch.on_sum is None:
        return stream
    normed, _ = residual_norm(ctx, branch.on_sum, stream, model.hidden, module_of(branch.on_sum.weight) or at)
    return Stream(normed)


def _before(ctx: Context, model: Model, branch: Branch, stream: Stream, at: str) -> tuple[str, Stream]:
    if branch.before is None:
        total = ctx.settled(stream, at)
        return total, Stream(total)
    return residual_norm(ctx, branch.before, stream, model.hidden, module_of(branch.before.weight) or at)


def _after(ctx: Context, model: Model, branch: Branch, body: Body, x: str, at: str) -> str:
    if branch.after is None:
        return body(x, branch.multiplier)
    y = norm(ctx, branch.after, body(x, 1.0), model.hidden, module_of(branch.after.weight) or at)
    if branch.multiplier != 1.0:
        y = ctx.graph.node("Mul", [y, ctx.graph.number(branch.multiplier, ctx.io)], at)
    return y


def _parallel(
    ctx: Context, model: Model, layer: Layer, stream: Stream, attend: Body, think: Body, at: str
) -> Stream:
    """Both bodies read the layer's input; an MLP without a norm reads what the attention reads."""
    x, stream = _before(ctx, model, layer.attention_branch, stream, at)
    y = x
    if layer.mlp_branch.before is not None:
        y, _ = _before(ctx, model, layer.mlp_branch, stream, at)
    attended = _after(ctx, model, layer.attention_branch, attend, x, at)
    thought = _after(ctx, model, layer.mlp_branch, think, y, at)
    return Stream(stream.value, ctx.graph.node("Add", [attended, thought], at))
