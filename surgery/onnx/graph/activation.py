# SPDX-License-Identifier: Apache-2.0
"""Activation functions as nodes."""

from __future__ import annotations

import math

import numpy as np

from surgery.onnx.graph.context import Context
from surgery.onnx.graph.graph import MICROSOFT, Graph
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import Activation

__all__ = ["activate", "gated_silu", "gelu_in_steps", "xielu"]

_GELU = 20  # the first operator set that has it
_MEAN = 128
"""Values that share a mean in `gated_silu`: a block of threads reads so many, and a token has enough of them to fill a GPU."""
_LEAST_MEAN = 32


def activate(ctx: Context, kind: Activation, x: str, at: str) -> str:
    """Apply an activation function."""
    if kind == "silu":
        return _silu(ctx, x, at)
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
    if kind == "relu2":
        positive = ctx.graph.node("Relu", [x], at)
        return ctx.graph.node("Mul", [positive, positive], at)
    if kind in ("gelu", "gelu_tanh") and ctx.opset < _GELU:
        return gelu_in_steps(ctx.graph, ctx.io, x, at, tanh=kind == "gelu_tanh")
    if kind == "gelu":
        return ctx.graph.node("Gelu", [x], at)
    if kind == "gelu_tanh":
        return ctx.graph.node("Gelu", [x], at, approximate="tanh")
    return ctx.graph.node({"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}[kind], [x], at)


def gated_silu(ctx: Context, gate: str, up: str, width: int, at: str) -> str | None:
    """``silu(gate) * up`` in one kernel, computed in fp32 and rounded once; None if `width` has no divisor that suits it.

    com.microsoft.GatedRMSNorm is ``up / sqrt(mean(up^2) + epsilon) * scale * silu(gate)``. With an epsilon beside which the mean is
    nothing and its root as the scale, the norm is a factor of 1: it is off by ``mean(up^2) / (2 epsilon)``, which in fp16, where the
    scale must be a number of the type, is half a unit in the last place once 128 neighbours have a root mean square of 1,024.
    """
    count = math.gcd(width, _MEAN)
    if count < _LEAST_MEAN:
        return None
    root = 2.0**15 if ctx.io is DType.F16 else 2.0**40
    scale = ctx.graph.constant(np.full(count, root, ctx.graph.numpy_type(ctx.io)))
    return ctx.graph.node("GatedRMSNorm", [up, scale, gate], at, domain=MICROSOFT, epsilon=root * root)


def _silu(ctx: Context, x: str, at: str) -> str:
    """``x sigmoid(x)``, in the target's form. What they are worth is in docs/precision.md."""
    graph, form = ctx.graph, ctx.target.silu
    if form in ("quick_gelu", "scaled"):
        return graph.node("QuickGelu" if form == "quick_gelu" else "ScaledSiLU", [x], at, domain=MICROSOFT, alpha=1.0)
    if form == "sigmoid":
        return graph.node("Mul", [x, graph.node("Sigmoid", [x], at)], at)
    short = ctx.io is not DType.F32  # whose exp(-x) would be infinite where the result is no zero yet
    wide = graph.cast(x, DType.F32, at) if short else x
    power = graph.node("Exp", [graph.node("Neg", [wide], at)], at)
    y = graph.node("Div", [wide, graph.node("Add", [power, graph.number(1.0, DType.F32)], at)], at)
    return graph.cast(y, ctx.io, at) if short else y


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
    half = graph.node("Tanh", [graph.node("Mul", [x, graph.number(0.5, ctx.io)], at)], at)
    return graph.node("Mul", [half, graph.node("Add", [graph.node("Exp", [x], at), graph.number(1.0, ctx.io)], at)], at)


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
