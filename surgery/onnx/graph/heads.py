# SPDX-License-Identifier: Apache-2.0
"""Heads, and the outputs of the graph."""

from __future__ import annotations

import numpy as np

from surgery.onnx.graph.activation import activate
from surgery.onnx.graph.context import Context, module_of
from surgery.onnx.graph.contract import KEEP
from surgery.onnx.graph.dims import CHOICES, KEPT, SEQUENCE
from surgery.onnx.graph.graph import END
from surgery.onnx.graph.linear import linear
from surgery.onnx.graph.modules import uncouple
from surgery.onnx.graph.norm import norm
from surgery.onnx.graph.patches import mean_of_patches
from surgery.onnx.graph.pooled import pooled_head
from surgery.onnx.graph.sentence import sentence_embedding
from surgery.onnx.graph.weights import LABELS
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import (
    ClassifierHead,
    HiddenHead,
    LanguageHead,
    Model,
    PooledHead,
    SpanHead,
)
from surgery_formats.models.families.recipe_sentence import SentenceHead

__all__ = ["add_head"]


def add_head(ctx: Context, model: Model, x: str) -> None:
    """Add the head of `model` on the last hidden states `x`, and the outputs."""
    match model.head:
        case LanguageHead():
            if ctx.keep_logits:
                x = _kept(ctx, x, model.hidden)
            tied = model.head.projection.weight == model.embedding.tokens
            _language_head(ctx, model.head, x, ctx.head if tied else "")
        case ClassifierHead():
            _classifier_head(ctx, model.head, x)
        case SpanHead():
            _span_head(ctx, model.head, x)
        case HiddenHead():
            _hidden_head(ctx, model.head, x, model.hidden)
        case PooledHead():
            pooled_head(ctx, model.head, x, model.hidden)
        case SentenceHead():
            _every_token(ctx, x, "", "last_hidden_state", model.hidden)
            sentence_embedding(ctx, model.head, "last_hidden_state")


def _language_head(ctx: Context, record: LanguageHead, x: str, slot: str = "") -> None:
    """Add the output ``logits (B, S, V)``; `slot` names the slot if the weight does not."""
    at = module_of(record.projection.weight)
    if record.before is not None:
        x = linear(ctx, record.before, x)
        if record.activation is not None:
            x = activate(ctx, record.activation, x, module_of(record.before.weight))
    if record.norm is not None:
        x = norm(ctx, record.norm, x, record.projection.inputs, module_of(record.norm.weight))
    for network in reversed(record.inverted):
        x = uncouple(ctx, network, x)
    y = linear(ctx, record.projection, x, alpha=1.0 / record.divisor, slot=slot)
    if record.bias:
        y = ctx.graph.node("Add", [y, ctx.weights.value(record.bias, (1, record.projection.outputs))], at)
    if record.softcap is not None:
        cap = ctx.graph.number(record.softcap, ctx.io)
        y = ctx.graph.node("Tanh", [ctx.graph.node("Div", [y, cap], at)], at)
        y = ctx.graph.node("Mul", [y, cap], at)
    if not ctx.keep_logits:
        _every_token(ctx, y, at, "logits", record.projection.outputs)
        return
    if ctx.flat:
        rows = ctx.graph.node("Shape", [ctx.ids], at, start=0, end=1)
        shape = ctx.graph.node("Concat", [rows, ctx.graph.ints(-1, record.projection.outputs)], at, axis=0)
        y = ctx.graph.node("Reshape", [y, shape], at, out="logits")
    else:
        y = ctx.graph.rename(y, "logits")
    ctx.graph.output(y, ctx.io, (ctx.batch, KEPT, record.projection.outputs))


def _kept(ctx: Context, x: str, width: int) -> str:
    """The hidden states of as many last positions as the optional input says; all if it is 0, the first place being -0."""
    graph, at = ctx.graph, "logits"
    keep = graph.input(KEEP, DType.I64, ())
    graph.initializer(KEEP, np.array(0, np.int64))
    start = graph.node("Unsqueeze", [graph.node("Neg", [keep], at), graph.ints(0)], at)
    x = ctx.batched(x, at) if ctx.flat else x
    x = graph.node("Slice", [x, start, graph.ints(END), graph.ints(1)], at)
    return ctx.reshaped(x, (-1, width), at) if ctx.flat else x


def _classifier_head(ctx: Context, record: ClassifierHead, x: str) -> None:
    """Add the output ``logits``: ``(B, labels)`` of one token, ``(B, S, labels)`` of all, or ``(B, C)`` of choices."""
    if record.tokens == "first":
        x = _first_token(ctx, x, "classifier")
    elif record.tokens == "last":
        x = _last_token(ctx, record, x)
    elif record.tokens in ("patches", "first_and_patches"):
        x = mean_of_patches(ctx, x, with_first=record.tokens == "first_and_patches")
    for index, (projection, activation) in enumerate(record.steps):
        at = module_of(projection.weight)
        if record.tokens == "mean" and index == record.early:
            x = _mean(ctx, x, projection.inputs)
        if record.norm is not None and projection is record.steps[-1][0]:
            x = norm(ctx, record.norm, x, projection.inputs, module_of(record.norm.weight))
        x = linear(ctx, projection, x)
        if activation is not None:
            x = activate(ctx, activation, x, at)
    last = record.steps[-1][0]
    labels: int | str = LABELS if last.weight in ctx.weights.replaceable.sizes else last.outputs
    if record.tokens == "every":
        _every_token(ctx, x, module_of(last.weight), "logits", labels)
    elif record.choices:
        shape = ctx.graph.node("Shape", ["input_ids"], "", start=0, end=2)
        ctx.graph.node("Reshape", [x, shape], module_of(last.weight), out="logits")
        ctx.graph.output("logits", ctx.io, (ctx.batch, CHOICES))
    else:
        ctx.graph.output(ctx.graph.rename(x, "logits"), ctx.io, (ctx.batch, labels))


def _span_head(ctx: Context, record: SpanHead, x: str) -> None:
    """Add the outputs ``start_logits (B, S)`` and ``end_logits (B, S)``."""
    at = module_of(record.projection.weight)
    if record.before is not None:
        projection, activation = record.before
        x = activate(ctx, activation, linear(ctx, projection, x), module_of(projection.weight))
    if record.norm is not None:
        x = norm(ctx, record.norm, x, record.projection.inputs, module_of(record.norm.weight))
    both = _tokens(ctx, linear(ctx, record.projection, x), at)
    for index, name in enumerate(("start_logits", "end_logits")):
        ctx.graph.node("Gather", [both, ctx.graph.number(index, DType.I64)], at, out=name, axis=2)
        ctx.graph.output(name, ctx.io, (ctx.batch, SEQUENCE))


def _hidden_head(ctx: Context, record: HiddenHead, x: str, width: int) -> None:
    """Add the outputs ``last_hidden_state (B, S, D)`` and, with a pooler, ``pooler_output (B, D)``."""
    _every_token(ctx, x, "", "last_hidden_state", width)
    if record.pooler is not None:
        at = module_of(record.pooler.weight)
        if ctx.virtual.front:  # the first token is a virtual one
            first = _first_token(ctx, x, at)
        else:
            first = ctx.graph.node("Gather", ["last_hidden_state", ctx.graph.number(0, DType.I64)], at, axis=1)
            first = _guarded(ctx, first, at)
        pooled = activate(ctx, "tanh", linear(ctx, record.pooler, first), at)
        ctx.graph.output(ctx.graph.rename(pooled, "pooler_output"), ctx.io, (ctx.batch, record.pooler.outputs))


def _first_token(ctx: Context, x: str, at: str) -> str:
    x = ctx.batched(x, at) if ctx.flat else x
    return _guarded(ctx, ctx.graph.node("Gather", [x, ctx.graph.number(0, DType.I64)], at, axis=1), at)


def _guarded(ctx: Context, first: str, at: str) -> str:
    """The states ``(B, D)`` of first tokens, but NaN of padding: a row that is padded on the left has no first token here."""
    if not (real := ctx.real()):  # of images
        return first
    begins = ctx.graph.node("Gather", [real, ctx.graph.constant(np.array([ctx.virtual.front]))], at, axis=1)
    one = ctx.graph.cast(begins, ctx.io, at)
    return ctx.graph.node("Mul", [first, ctx.graph.node("Div", [one, one], at)], at)


def _mean(ctx: Context, x: str, width: int) -> str:
    """The mean ``(B, D)`` of the tokens of each row, padding left out; a product, so that no sum grows with the length."""
    graph, at = ctx.graph, "classifier"
    x = ctx.batched(x, at) if ctx.flat else x
    real = graph.cast(graph.node("Unsqueeze", [ctx.real(), graph.ints(1)], at), DType.F32, at)
    share = graph.node("Div", [real, graph.node("ReduceSum", [real, graph.ints(2)], at, keepdims=1)], at)
    if ctx.io is not DType.F32:
        share = graph.cast(share, ctx.io, at)
    return ctx.reshaped(graph.node("MatMul", [share, x], at), (-1, width), at)


def _last_token(ctx: Context, record: ClassifierHead, x: str) -> str:
    """States ``(B, D)`` of the rightmost token of each row that is not the padding token; of rows without any, the first."""
    x, graph = ctx.batched(x, "classifier") if ctx.flat else x, ctx.graph
    if record.padding_token is None:  # a single row
        return graph.node("Gather", [x, graph.number(-1, DType.I64)], "classifier", axis=1)
    at = "classifier"
    length = graph.node("Squeeze", [graph.node("Shape", [ctx.ids], at, start=1, end=2)], at)
    places = graph.node("Range", [graph.number(0, DType.I64), length, graph.number(1, DType.I64)], at)
    is_padding = graph.node("Equal", [ctx.ids, graph.number(record.padding_token, DType.I64)], at)
    is_token = graph.cast(graph.node("Not", [is_padding], at), DType.I64, at)
    of_tokens = graph.node("Mul", [places, is_token], at)
    last = graph.node("ReduceMax", [of_tokens, graph.ints(1)], at, keepdims=1)
    return graph.node("GatherND", [x, last], at, batch_dims=1)


def _every_token(ctx: Context, x: str, at: str, name: str, width: int | str) -> None:
    ctx.graph.output(_tokens(ctx, x, at, name), ctx.io, (ctx.batch, ctx.sequence, width))


def _tokens(ctx: Context, x: str, at: str, name: str = "") -> str:
    """`x` as ``(B, S, ...)``, called `name`, without virtual tokens, whose results are not part of the output."""
    if ctx.virtual.front:
        x = ctx.batched(x, at) if ctx.flat else x
        ends = [ctx.graph.ints(bound) for bound in (ctx.virtual.front, END, 1)]
        return ctx.graph.node("Slice", [x, *ends], at, out=name or "*")
    if ctx.flat:
        return ctx.batched(x, at, out=name or "*")
    return ctx.graph.rename(x, name) if name else x
