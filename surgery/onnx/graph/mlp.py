# SPDX-License-Identifier: Apache-2.0
"""The MLP of a layer, gated or not."""

from __future__ import annotations

from surgery.onnx.graph.context import Context, module_of
from surgery.onnx.graph.graph import MICROSOFT
from surgery.onnx.graph.linear import joined, linear
from surgery_formats.models.families.recipe import MLP, Activation

__all__ = ["activate", "mlp"]


def mlp(ctx: Context, record: MLP, x: str, *, alpha: float = 1.0) -> str:
    """``alpha down(act(gate x) * up x)``, or without a gate ``alpha down(act(up x))``."""
    at = module_of(module_of(record.output.weight))
    if not record.gated:
        inner = activate(ctx, record.activation, linear(ctx, record.inputs[0], x), at)
        return linear(ctx, record.output, inner, alpha=alpha)
    if len(record.inputs) == 1:
        gate_up: str | None = linear(ctx, record.inputs[0], x)
    else:
        gate_up = joined(ctx, record.inputs, x) if ctx.target.packed == "all" else None
    if gate_up is not None:
        gate, up = ctx.graph.several("Split", [gate_up], at, ("*", "*"), axis=-1, num_outputs=2)
    else:
        gate, up = (linear(ctx, projection, x) for projection in record.inputs)
    inner = ctx.graph.node("Mul", [activate(ctx, record.activation, gate, at), up], at)
    return linear(ctx, record.output, inner, alpha=alpha)


def activate(ctx: Context, kind: Activation, x: str, at: str) -> str:
    """Apply an activation function."""
    if kind == "silu":
        if ctx.target.activation == "fused":  # x sigmoid(alpha x)
            return ctx.graph.node("QuickGelu", [x], at, domain=MICROSOFT, alpha=1.0)
        return ctx.graph.node("Mul", [x, ctx.graph.node("Sigmoid", [x], at)], at)
    if kind == "gelu":
        return ctx.graph.node("Gelu", [x], at)
    if kind == "gelu_tanh":
        return ctx.graph.node("Gelu", [x], at, approximate="tanh")
    return ctx.graph.node({"relu": "Relu", "tanh": "Tanh"}[kind], [x], at)
