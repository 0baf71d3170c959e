# SPDX-License-Identifier: Apache-2.0
"""All experts of a layer in one com.microsoft.MoE over weights as they are stored, if that is asked for.

The operator wants the experts of a layer in one tensor, rows of gate and up in turn, which no checkpoint has. Files stay as they
are: nodes put the weights together, and a runtime folds these when it loads the graph, for which it needs memory and time.
"""

from __future__ import annotations

from typing import Any

from surgery.onnx.graph.context import Context
from surgery.onnx.graph.fused_experts import ALPHA, are_alike, weights_of
from surgery.onnx.graph.graph import MICROSOFT
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import Experts, Projection

__all__ = ["stored_at_once", "stored_experts"]


def stored_at_once(ctx: Context, record: Experts) -> bool:
    """Whether one operator computes the experts of a layer exactly: it takes the softmax of the router over all of them."""
    chosen = record.scoring == "softmax" and not record.correction and record.best_groups == record.groups
    weights = weights_of(record)
    asked = ctx.target.experts == "fused" and ctx.target.linear != "matmul" and ctx.io is DType.F32
    free = ctx.slotted.isdisjoint(weights) and ctx.weights.replaceable.names.isdisjoint(weights)
    if not asked or not chosen or record.floor or not free or not are_alike(record):
        return False
    if any(map(ctx.weights.is_coded, weights)):
        return False
    return len({_stored_type(ctx, part) for one in record.experts for part in (*one.inputs, one.output)}) == 1


def stored_experts(ctx: Context, record: Experts, rows: str, logits: str, at: str) -> str:
    """The weighted sum of the chosen experts' results ``(N, D)``, before the factor on it."""
    expert, count = record.experts[0], len(record.experts)
    hidden, inner = expert.inputs[0].inputs, expert.output.inputs
    inputs = _stack(ctx, [part for one in record.experts for part in one.inputs], at)
    if not expert.interleaved:
        parted = ctx.reshaped(inputs, (count, 2, inner, hidden), at)
        turned = ctx.graph.node("Transpose", [parted], at, perm=[0, 2, 1, 3])
        inputs = ctx.reshaped(turned, (count, 2 * inner, hidden), at)
    elif expert.inputs[0].stack is None:
        inputs = ctx.reshaped(inputs, (count, 2 * inner, hidden), at)
    outputs = _stack(ctx, [one.output for one in record.experts], at)
    if expert.output.stack is None:
        outputs = ctx.reshaped(outputs, (count, hidden, inner), at)
    names = expert.inputs[0].bias, expert.output.bias
    biases = [
        ctx.weights.value(name, (count, width)) if name else ""
        for name, width in zip(names, (2 * inner, hidden), strict=True)
    ]
    both, down = (_cast(ctx, record, value, at) for value in (inputs, outputs))
    limit: dict[str, Any] = {} if expert.limit is None else {"swiglu_limit": float(expert.limit)}
    return ctx.graph.node(
        "MoE",
        [rows, logits, both, biases[0], down, biases[1]],
        at,
        domain=MICROSOFT,
        k=record.top,
        activation_type="swiglu",
        activation_alpha=ALPHA[expert.activation],
        activation_beta=float(expert.up_plus),
        swiglu_fusion=1,
        normalize_routing_weights=int(record.normalised),
        **limit,
    )


def _stored_type(ctx: Context, part: Projection) -> DType:
    count = part.stack[1] if part.stack else 0
    sizes = (part.inputs, part.outputs) if part.transposed else (part.outputs, part.inputs)
    return ctx.weights.find(part.weight, (count, *sizes) if count else sizes).dtype


def _stack(ctx: Context, parts: list[Projection], at: str) -> str:
    """The weights of projections under each other, in the type that they are stored in, which takes the least memory."""
    first = parts[0]
    if first.stack is None:
        values = [ctx.weights.as_stored(part.weight, (part.outputs, part.inputs))[0] for part in parts]
        return ctx.graph.node("Concat", values, at, axis=0) if len(values) > 1 else values[0]
    sizes = (first.inputs, first.outputs) if first.transposed else (first.outputs, first.inputs)
    whole, _ = ctx.weights.as_stored(first.weight, (first.stack[1], *sizes))
    return ctx.graph.node("Transpose", [whole], at, perm=[0, 2, 1]) if first.transposed else whole


def _cast(ctx: Context, record: Experts, value: str, at: str) -> str:
    return value if _stored_type(ctx, record.experts[0].output) is ctx.io else ctx.graph.cast(value, ctx.io, at)
