# SPDX-License-Identifier: Apache-2.0
"""Activation functions as nodes."""

from __future__ import annotations

import math

from surgery.onnx.graph.context import Context
from surgery.onnx.graph.graph import MICROSOFT
from surgery_formats.models.families.recipe import Activation

__all__ = ["activate"]

_GELU = 20  # the first operator set that has it


def activate(ctx: Context, kind: Activation, x: str, at: str) -> str:
    """Apply an activation function."""
    if kind == "silu":
        if ctx.target.activation == "fused":  # x sigmoid(alpha x)
            return ctx.graph.node("QuickGelu", [x], at, domain=MICROSOFT, alpha=1.0)
        return ctx.graph.node("Mul", [x, ctx.graph.node("Sigmoid", [x], at)], at)
    if kind == "quick_gelu":
        return ctx.graph.node("Mul", [x, ctx.graph.node("Sigmoid", [_scaled(ctx, x, 1.702, at)], at)], at)
    if kind == "leaky_relu":
        return ctx.graph.node("LeakyRelu", [x], at, alpha=0.01)
    if kind == "linear":
        return x
    if kind in ("gelu", "gelu_tanh") and ctx.opset < _GELU:
        return _gelu_in_steps(ctx, kind, x, at)
    if kind == "gelu":
        return ctx.graph.node("Gelu", [x], at)
    if kind == "gelu_tanh":
        return ctx.graph.node("Gelu", [x], at, approximate="tanh")
    return ctx.graph.node({"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}[kind], [x], at)


def _scaled(ctx: Context, x: str, factor: float, at: str) -> str:
    return ctx.graph.node("Mul", [x, ctx.graph.number(factor, ctx.io)], at)


def _gelu_in_steps(ctx: Context, kind: Activation, x: str, at: str) -> str:
    graph = ctx.graph
    if kind == "gelu":
        inner = graph.node("Erf", [_scaled(ctx, x, 2**-0.5, at)], at)
    else:
        cube = graph.node("Mul", [graph.node("Mul", [x, x], at), x], at)
        total = graph.node("Add", [x, _scaled(ctx, cube, 0.044715, at)], at)
        inner = graph.node("Tanh", [_scaled(ctx, total, (2 / math.pi) ** 0.5, at)], at)
    return graph.node("Mul", [_scaled(ctx, x, 0.5, at), graph.node("Add", [inner, graph.number(1.0, ctx.io)], at)], at)
