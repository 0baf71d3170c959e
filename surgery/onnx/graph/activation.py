# SPDX-License-Identifier: Apache-2.0
"""Activation functions as nodes."""

from __future__ import annotations

import math

from surgery.onnx.graph.context import Context
from surgery.onnx.graph.graph import MICROSOFT, Graph
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import Activation

__all__ = ["activate", "gelu_in_steps"]

_GELU = 20  # the first operator set that has it


def activate(ctx: Context, kind: Activation, x: str, at: str) -> str:
    """Apply an activation function."""
    if kind == "silu":
        if ctx.target.activation == "fused":  # x sigmoid(alpha x)
            return ctx.graph.node("QuickGelu", [x], at, domain=MICROSOFT, alpha=1.0)
        return ctx.graph.node("Mul", [x, ctx.graph.node("Sigmoid", [x], at)], at)
    if kind == "quick_gelu":
        return ctx.graph.node(
            "Mul",
            [x, ctx.graph.node("Sigmoid", [ctx.graph.node("Mul", [x, ctx.graph.number(1.702, ctx.io)], at)], at)],
            at,
        )
    if kind == "leaky_relu":
        return ctx.graph.node("LeakyRelu", [x], at, alpha=0.01)
    if kind == "linear":
        return x
    if kind in ("gelu", "gelu_tanh") and ctx.opset < _GELU:
        return gelu_in_steps(ctx.graph, ctx.io, x, at, tanh=kind == "gelu_tanh")
    if kind == "gelu":
        return ctx.graph.node("Gelu", [x], at)
    if kind == "gelu_tanh":
        return ctx.graph.node("Gelu", [x], at, approximate="tanh")
    return ctx.graph.node({"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}[kind], [x], at)


def gelu_in_steps(graph: Graph, io: DType, x: str, at: str, *, tanh: bool, out: str = "*") -> str:
    """Gelu for operator sets before 20."""

    def scaled(value: str, factor: float) -> str:
        return graph.node("Mul", [value, graph.number(factor, io)], at)

    if tanh:
        cube = graph.node("Mul", [graph.node("Mul", [x, x], at), x], at)
        total = graph.node("Add", [x, scaled(cube, 0.044715)], at)
        inner = graph.node("Tanh", [scaled(total, (2 / math.pi) ** 0.5)], at)
    else:
        inner = graph.node("Erf", [scaled(x, 2**-0.5)], at)
    return graph.node("Mul", [scaled(x, 0.5), graph.node("Add", [inner, graph.number(1.0, io)], at)], at, out=out)
