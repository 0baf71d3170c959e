# SPDX-License-Identifier: Apache-2.0
"""Linear maps over weights as they are stored: transposed in the multiplication, never by a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery.onnx.graph.coded import GraphCodes, coded_product, float_values
from surgery.onnx.graph.context import Context, module_of
from surgery.onnx.graph.contract import Slot
from surgery.onnx.graph.graph import MICROSOFT
from surgery.onnx.graph.weights import joint_name
from surgery_formats.models.families.recipe import Projection

__all__ = ["declared_slot", "joined", "linear", "lora_slot"]


def linear(ctx: Context, projection: Projection, x: str, *, alpha: float = 1.0, slot: str = "") -> str:
    """``alpha (x W^T + b)``; the slot is named after the weight unless `slot` says otherwise."""
    y = _product(ctx, projection, x, alpha)
    slot = "" if projection.stack else slot or projection.weight
    return lora_slot(ctx, slot, x, y, projection.inputs, projection.outputs, alpha) if slot in ctx.slotted else y


def _product(ctx: Context, projection: Projection, x: str, alpha: float = 1.0) -> str:
    stored = (
        (projection.inputs, projection.outputs) if projection.transposed else (projection.outputs, projection.inputs)
    )
    at, stack = module_of(projection.weight), projection.stack
    outputs = projection.outputs * (stack[1] if stack else 1)
    coded = ctx.weights.coded([projection.weight], [(outputs, projection.inputs)])
    if coded is not None:
        coded = coded.matrix(*stack) if stack else coded
        bias = ctx.weights.part(projection.bias, (projection.outputs,), stack) if projection.bias else ""
        return _coded(ctx, coded, x, bias, at, alpha)
    weight = _across(ctx, projection) if ctx.target.linear == "matmul" else ""
    weight = weight or ctx.weights.part(projection.weight, stored, stack)
    bias = ctx.weights.part(projection.bias, (projection.outputs,), stack) if projection.bias else ""
    return _multiply(ctx, x, weight, bias, at, transposed=projection.transposed, alpha=alpha)


def joined(ctx: Context, projections: Sequence[Projection], x: str) -> str | None:
    """Several maps of the same input as one, outputs side by side; None if their weights are not adjacent in the file.

    Biases are joined by a Concat that runtimes fold. With packed slots the outputs of weights that are not adjacent are joined,
    too, where a slot is: one pair of factors adds to all.
    """
    slotted = any(part.weight in ctx.slotted for part in projections)
    apart = ctx.target.packed == "none" or any(part.transposed or part.stack for part in projections)
    if apart or (slotted and not ctx.packed):
        return None
    y = _adjacent(ctx, projections, x)
    if not slotted:
        return y
    if y is None:
        at = module_of(module_of(projections[0].weight))
        y = ctx.graph.node("Concat", [_product(ctx, part, x) for part in projections], at, axis=-1)
    parts = tuple((part.weight, part.outputs) for part in projections)
    slot = joint_name([part.weight for part in projections])
    return lora_slot(ctx, slot, x, y, projections[0].inputs, sum(width for _, width in parts), parts=parts)


def _adjacent(ctx: Context, projections: Sequence[Projection], x: str) -> str | None:
    if ctx.target.linear == "matmul":
        return None
    weights, sizes = [part.weight for part in projections], [(part.outputs, part.inputs) for part in projections]
    coded = ctx.weights.coded(weights, sizes)
    if coded is None and ctx.weights.has_codes and any(map(ctx.weights.is_coded, weights)):
        return None
    weight = ctx.weights.adjacent(weights, sizes) if coded is None else coded.name
    if weight is None or len({bool(part.bias) for part in projections}) > 1:
        return None
    at = module_of(weight)
    bias = ""
    if projections[0].bias:
        names, shapes = [part.bias for part in projections], [(part.outputs,) for part in projections]
        bias = ctx.weights.adjacent(names, shapes) or ctx.graph.node(
            "Concat", [ctx.weights.value(name, shape) for name, shape in zip(names, shapes, strict=True)], at, axis=0
        )
    return _multiply(ctx, x, weight, bias, at) if coded is None else _coded(ctx, coded, x, bias, at)


def _across(ctx: Context, projection: Projection) -> str:
    """The weight ``(in, out)``; turned by a node where it was not written so."""
    at, sizes = module_of(projection.weight), (projection.outputs, projection.inputs)
    if projection.transposed:
        return ctx.weights.part(projection.weight, sizes[::-1], projection.stack)
    written = None if projection.stack else ctx.weights.across(projection.weight, sizes[::-1])
    if written is not None:
        return written
    weight = ctx.weights.part(projection.weight, sizes, projection.stack)
    return ctx.graph.node("Transpose", [weight], at, perm=[1, 0])


def _coded(ctx: Context, weight: GraphCodes, x: str, bias: str, at: str, alpha: float = 1.0) -> str:
    if weight.form.floats:
        return _multiply(ctx, x, float_values(ctx.graph, weight, ctx.io, at), bias, at, alpha=alpha)
    y = coded_product(ctx.graph, weight, x, ctx.io, at)
    y = ctx.graph.node("Add", [y, bias], at) if bias else y
    return ctx.graph.node("Mul", [y, ctx.graph.number(alpha, ctx.io)], at) if alpha != 1.0 else y


def _multiply(
    ctx: Context, x: str, weight: str, bias: str, at: str, *, transposed: bool = False, alpha: float = 1.0
) -> str:
    factor: dict[str, Any] = {} if alpha == 1.0 else {"alpha": float(alpha)}
    if ctx.flat:
        beta: dict[str, Any] = {} if alpha == 1.0 or not bias else {"beta": float(alpha)}
        return ctx.graph.node("Gemm", [x, weight, bias], at, transB=0 if transposed else 1, **factor, **beta)
    if ctx.target.linear == "matmul":
        y = ctx.graph.node("MatMul", [x, weight], at)
        y = ctx.graph.node("Mul", [y, ctx.graph.number(alpha, ctx.io)], at) if alpha != 1.0 else y
    else:
        y = ctx.graph.node("FusedMatMul", [x, weight], at, domain=MICROSOFT, transB=0 if transposed else 1, **factor)
    if not bias:
        return y
    if alpha != 1.0:
        bias = ctx.graph.node("Mul", [bias, ctx.graph.number(alpha, ctx.io)], at)
    return ctx.graph.node("Add", [y, bias], at)


def lora_slot(
    ctx: Context,
    weight: str,
    x: str,
    y: str,
    inputs: int,
    outputs: int,
    alpha: float = 1.0,
    *,
    rows: bool = False,
    parts: tuple[tuple[str, int], ...] = (),
) -> str:
    """``y + alpha x A B``, with A and B as inputs, of rank 0 by default unless all are required, in the slot of `weight`.

    With `rows` the weight is a table, and `x` the ids that select rows of A; `parts` are the weights of a packed slot.
    """
    at = module_of(weight)
    a, b = declared_slot(ctx, weight, inputs, outputs, parts)
    projected = ctx.graph.node("Gather", [a, x], at, axis=0) if rows else ctx.graph.node("MatMul", [x, a], at)
    if ctx.packed and not rows and ctx.flat and (ctx.required or ctx.target.name == "cpu"):
        # the sum inside the product; whether Gemm takes a rank of 0 anywhere but on the CPU is not known
        factor: dict[str, Any] = {} if alpha == 1.0 else {"alpha": float(alpha)}
        return ctx.graph.node("Gemm", [projected, b, y], at, **factor)
    if alpha != 1.0:
        projected = ctx.graph.node("Mul", [projected, ctx.graph.number(alpha, ctx.io)], at)
    return ctx.graph.node("Add", [y, ctx.graph.node("MatMul", [projected, b], at)], at)


def declared_slot(
    ctx: Context, weight: str, inputs: int, outputs: int, parts: tuple[tuple[str, int], ...] = ()
) -> tuple[str, str]:
    """The inputs A and B of the slot of `weight`, of which a packed one has `parts`."""
    at = module_of(weight)
    a, b, rank = f"{at}.lora_A.weight", f"{at}.lora_B.weight", f"rank of {at}"
    dtype = ctx.graph.numpy_type(ctx.io)
    if not any(slot.weight == weight for slot in ctx.slots):  # layers may share a weight
        for name, empty, shape in (
            (a, (inputs, 0), (inputs, rank)),
            (b, (0, outputs), (rank, outputs)),
        ):
            ctx.graph.input(name, ctx.io, shape)
            if not ctx.required:
                ctx.graph.initializer(name, np.zeros(empty, dtype))
        ctx.slots.append(Slot(weight, a, b, parts))
    return a, b
