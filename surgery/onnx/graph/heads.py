# SPDX-License-Identifier: Apache-2.0
"""Heads, and the outputs of the graph."""

from __future__ import annotations

from surgery.onnx.graph.activation import activate
from surgery.onnx.graph.context import Context, module_of
from surgery.onnx.graph.dims import BATCH, SEQUENCE
from surgery.onnx.graph.linear import linear
from surgery.onnx.graph.modules import uncouple
from surgery.onnx.graph.weights import LABELS
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import ClassifierHead, HiddenHead, LanguageHead

__all__ = ["classifier_head", "hidden_head", "language_head"]

_ALL = 2**62  # an end of Slice beyond any length


def language_head(ctx: Context, record: LanguageHead, x: str, slot: str = "") -> None:
    """Add the output ``logits (B, S, V)``; `slot` names the slot if the weight does not."""
    at = module_of(record.projection.weight)
    if record.before is not None:
        x = linear(ctx, record.before, x)
    for network in reversed(record.inverted):
        x = uncouple(ctx, network, x)
    y = linear(ctx, record.projection, x, alpha=1.0 / record.divisor, slot=slot)
    if record.softcap is not None:
        cap = ctx.graph.number(record.softcap, ctx.io)
        y = ctx.graph.node("Tanh", [ctx.graph.node("Div", [y, cap], at)], at)
        y = ctx.graph.node("Mul", [y, cap], at)
    _every_token(ctx, y, at, "logits", record.projection.outputs)


def classifier_head(ctx: Context, record: ClassifierHead, x: str) -> None:
    """Add the output ``logits``: ``(B, labels)`` of the first token, or ``(B, S, labels)``."""
    if record.tokens == "first":
        x = _first_token(ctx, x, "classifier")
    for projection, activation in record.steps:
        at = module_of(projection.weight)
        x = linear(ctx, projection, x)
        if activation is not None:
            x = activate(ctx, activation, x, at)
    last = record.steps[-1][0]
    labels: int | str = LABELS if last.weight in ctx.weights.replaceable.sizes else last.outputs
    if record.tokens == "every":
        _every_token(ctx, x, module_of(last.weight), "logits", labels)
    else:
        ctx.graph.output(ctx.graph.rename(x, "logits"), ctx.io, (BATCH, labels))


def hidden_head(ctx: Context, record: HiddenHead, x: str, width: int) -> None:
    """Add the outputs ``last_hidden_state (B, S, D)`` and, with a pooler, ``pooler_output (B, D)``."""
    _every_token(ctx, x, "", "last_hidden_state", width)
    if record.pooler is not None:
        at = module_of(record.pooler.weight)
        if ctx.virtual.front:  # the first token is a virtual one
            first = _first_token(ctx, x, at)
        else:
            first = ctx.graph.node("Gather", ["last_hidden_state", ctx.graph.number(0, DType.I64)], at, axis=1)
        pooled = activate(ctx, "tanh", linear(ctx, record.pooler, first), at)
        ctx.graph.output(ctx.graph.rename(pooled, "pooler_output"), ctx.io, (BATCH, record.pooler.outputs))


def _first_token(ctx: Context, x: str, at: str) -> str:
    x = ctx.batched(x, at) if ctx.flat else x
    return ctx.graph.node("Gather", [x, ctx.graph.number(0, DType.I64)], at, axis=1)


def _every_token(ctx: Context, x: str, at: str, name: str, width: int | str) -> None:
    if ctx.virtual.front:  # results at virtual tokens are not part of the output
        x = ctx.batched(x, at) if ctx.flat else x
        ends = [ctx.graph.ints(bound) for bound in (ctx.virtual.front, _ALL, 1)]
        y = ctx.graph.node("Slice", [x, *ends], at, out=name)
    else:
        y = ctx.batched(x, at, out=name) if ctx.flat else ctx.graph.rename(x, name)
    ctx.graph.output(y, ctx.io, (BATCH, SEQUENCE, width))
