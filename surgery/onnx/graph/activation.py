# SPDX-License-Identifier: Apache-2.0
"""Activation functions as nodes."""

from __future__ import annotations

import math

from surgery.onnx.graph.context import Context
from surgery.onnx.graph.graph import MICROSOFT
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import Activation

__all__ = ["activate", "xielu"]

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
    if kind == "relu2":
        positive = ctx.graph.node("Relu", [x], at)
        return ctx.graph.node("Mul", [positive, positive], at)
    if kind in ("gelu", "gelu_tanh") and ctx.opset < _GELU:
        return _gelu_in_steps(ctx, kind, x, at)
    if kind == "gelu":
        return ctx.graph.node("Gelu", [x], at)
    if kind == "gelu_tanh":
        return ctx.graph.node("Gelu", [x], at, approximate="tanh")
    return ctx.graph.node({"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}[kind], [x], at)


def xielu(ctx: Context, at: str, x: str) -> str:
    """Apply xIELU with the learned numbers of module `at`, see `MLP.shape`; runtimes fold what depends on them alone."""
    graph = ctx.graph

    def number(name: str, shape: tuple[int, ...]) -> str:
        return ctx.weights.exact(f"{at}.{name}", shape)

    def stored(value: str) -> str:
        return value if ctx.io is DType.F32 else graph.cast(value, ctx.io, at)

    beta, least = number("beta", ()), stored(number("eps", ()))
    positive = stored(graph.node("Softplus", [number("alpha_p", (1,))], at))
    negative = stored(graph.node("Add", [graph.node("Softplus", [number("alpha_n", (1,))], at), beta], at))
    linear = graph.node("Mul", [x, stored(beta)], at)
    above = graph.node("Mul", [graph.node("Mul", [x, x], at), positive], at)
    below = _expm1(ctx, graph.node("Min", [x, least], at), at)
    below = graph.node("Mul", [graph.node("Sub", [below, x], at), negative], at)
    is_above = graph.node("Greater", [x, graph.number(0.0, ctx.io)], at)
    return graph.node("Add", [graph.node("Where", [is_above, above, below], at), linear], at)


def _expm1(ctx: Context, x: str, at: str) -> str:
    """``exp(x) - 1`` without cancellation: ``t (exp(x) + 1)`` with ``t = tanh(x / 2)``."""
    graph = ctx.graph
    half = graph.node("Tanh", [_scaled(ctx, x, 0.5, at)], at)
    return graph.node("Mul", [half, graph.node("Add", [graph.node("Exp", [x], at), graph.number(1.0, ctx.io)], at)], at)


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
