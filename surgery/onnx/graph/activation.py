# SPDX-License-Identifier: Apache-2.0
"""Activation functions as nodes."""

from __future__ import annotations

from surgery.onnx.graph.context import Context
from surgery.onnx.graph.graph import MICROSOFT
from surgery_formats.models.families.recipe import Activation

__all__ = ["activate"]


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
    if kind == "gelu":
        return ctx.graph.node("Gelu", [x], at)
    if kind == "gelu_tanh":
        return ctx.graph.node("Gelu", [x], at, approximate="tanh")
    return ctx.graph.node({"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}[kind], [x], at)


def _scaled(ctx: Context, x: str, factor: float, at: str) -> str:
    return ctx.graph.node("Mul", [x, ctx.graph.number(factor, ctx.io)], at)
