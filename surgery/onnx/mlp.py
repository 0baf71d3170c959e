# SPDX-License-Identifier: Apache-2.0
"""The MLP of a layer, gated or not."""

from __future__ import annotations

from surgery.onnx.context import Context, module_of
from surgery.onnx.graph import MICROSOFT
from surgery.onnx.linear import joined, linear
from surgery_formats.families.recipe import MLP, Activation

__all__ = ["activate", "mlp"]


def mlp(ctx: Context, record: MLP, x: str, *, alpha: float = 1.0) -> str:
    """``alpha down(act(gate x) * up x)``, or without a gate ``alpha down(act(up x))``."""
    at = module_of(module_of(record.output.weight))
    if not record.gated:
        inner = activate(ctx, record.activation, linear(ctx, record.inputs[0], x), at)
        return linear(ctx, record.output, inner, alpha=alpha)
    if ctx.target.mlp == "expert" and alpha == 1.0 and (found := _expert(ctx, record, x, at)) is not None:
        return found
    if len(record.inputs) == 1:
        both: str | None = linear(ctx, record.inputs[0], x)
    else:
        both = joined(ctx, record.inputs, x)
    if both is not None:
        gate, up = ctx.graph.several("Split", [both], at, ("*", "*"), axis=-1, num_outputs=2)
    else:
        gate, up = (linear(ctx, one, x) for one in record.inputs)
    inner = ctx.graph.node("Mul", [activate(ctx, record.activation, gate, at), up], at)
    return linear(ctx, record.output, inner, alpha=alpha)


def _expert(ctx: Context, record: MLP, x: str, at: str) -> str | None:
    """The whole MLP as one expert that every token goes to; None where the operator does not fit."""
    every = (*record.inputs, record.output)
    if record.activation != "silu" or any(one.bias or one.transposed or one.weight in ctx.slotted for one in every):
        return None
    first = ctx.weights.adjacent(
        [one.weight for one in record.inputs], [(one.outputs, one.inputs) for one in record.inputs], stacked=True
    )
    if first is None:
        return None
    last = ctx.weights.adjacent([record.output.weight], [(record.output.outputs, record.output.inputs)], stacked=True)
    return ctx.graph.node(
        "MoE",
        [x, ctx.every_token_to_one_expert, first, "", last or ""],
        at,
        domain=MICROSOFT,
        k=1,
        activation_type="swiglu",
        swiglu_fusion=2,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=1,
    )


def activate(ctx: Context, kind: Activation, x: str, at: str) -> str:
    """An activation function."""
    if kind == "silu":
        if ctx.target.activation == "fused":  # x sigmoid(alpha x)
            return ctx.graph.node("QuickGelu", [x], at, domain=MICROSOFT, alpha=1.0)
        return ctx.graph.node("Mul", [x, ctx.graph.node("Sigmoid", [x], at)], at)
    if kind == "gelu":
        return ctx.graph.node("Gelu", [x], at)
    if kind == "gelu_tanh":
        return ctx.graph.node("Gelu", [x], at, approximate="tanh")
    return ctx.graph.node({"relu": "Relu", "tanh": "Tanh"}[kind], [x], at)
