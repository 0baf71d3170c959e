# SPDX-License-Identifier: Apache-2.0
"""Networks that adapters insert: behind the body of a branch, behind the embeddings, in front of the head.

Their matrices are either in the graph, or optional inputs without inner values. A `Where` then takes the plain branch, so
that a graph without an adapter computes the base exactly, whatever the network would make of nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from surgery.onnx.graph.activation import activate
from surgery.onnx.graph.context import Context, module_of
from surgery.onnx.graph.norm import norm
from surgery_formats.models.families.recipe import Activation, Bottleneck, Branch, Coupling, Norm, Projection

__all__ = ["body_with_modules", "couple", "run_inserted", "uncouple"]

_LAYER_NORM = 17  # the first operator set that has it


def run_inserted(ctx: Context, branch: Branch, x: str, body: str, width: int, at: str) -> str:
    """The result of a branch of input `x` with inserted networks behind the body's result `body`."""

    def finished(network: Bottleneck | None, state: str) -> str:
        if network is not None and not network.form.finishes:
            return state
        total = ctx.graph.node("Add", [x, state], at)
        return total if branch.on_sum is None else _norm(ctx, branch.on_sum, total, width, at)

    return _chained(ctx, branch, x, body, width, at, finished)


def body_with_modules(ctx: Context, branch: Branch, x: str, body: str, bias: str, width: int, at: str) -> str:
    """What takes the place of the body's result in the branch's own sum; of networks that leave that sum alone.

    `bias`, or nothing, is one that the sum adds to `body` by itself.
    """

    def finished(network: Bottleneck | None, state: str) -> str:
        if network is None:
            return body
        return ctx.graph.node("Sub", [state, bias], at) if bias else state

    whole = ctx.graph.node("Add", [body, bias], at) if bias else body
    return _chained(ctx, branch, x, whole, width, at, finished)


def _chained(
    ctx: Context,
    branch: Branch,
    x: str,
    body: str,
    width: int,
    at: str,
    finished: Callable[[Bottleneck | None, str], str],
) -> str:
    """The networks one after the other, and what the last active one leaves, or the body's result, `finished`."""
    state, result = body, ""
    for network in branch.inserted:
        changed = _bottleneck(ctx, network, branch, x, state, width)
        ended = ctx.graph.node("Add", [changed, body], at) if network.form.parallel else changed
        ended = finished(network, ended)
        if (active := _active(ctx, network.down)) is None:
            state, result = changed, ended
            continue
        plain = result or finished(None, body)
        if network is not branch.inserted[-1]:
            state = ctx.graph.node("Where", [active, changed, state], at)
        result = ctx.graph.node("Where", [active, ended, plain], at)
    return result


def _active(ctx: Context, projection: Projection) -> str | None:
    """Whether an optional projection has inner values ``(1,)``; None for one that always has."""
    if projection.weight not in ctx.weights.replaceable.names:
        return None
    at = module_of(projection.weight)
    weight = ctx.weights.value(projection.weight, (projection.inputs, projection.outputs))
    rank = ctx.graph.node("Gather", [ctx.graph.node("Shape", [weight], at), ctx.graph.ints(1)], at, axis=0)
    return ctx.graph.node("Greater", [rank, ctx.graph.ints(0)], at)


def _bottleneck(ctx: Context, network: Bottleneck, branch: Branch, x: str, state: str, width: int) -> str:
    form, at, graph = network.form, network.module, ctx.graph
    read, residual = state, state
    if form.parallel:
        read = x
    elif form.sums_before:
        total = read = graph.node("Add", [x, state], at)
        if branch.on_sum is not None:
            read = _norm(ctx, branch.on_sum, total, width, at)
        residual = {"body": state, "sum": total, "read": read}[form.residual]
    inner = read if network.before is None else _norm(ctx, network.before, read, width, at)
    result = _inner(ctx, inner, (network.down, network.up), form.activation)
    if network.gate is not None:
        result = _gated(ctx, result, _affine(ctx, read, network.gate), width, at)
    if not form.parallel and form.residual_before_norm:
        result = graph.node("Add", [result, residual], at)
    if network.after is not None:
        result = _norm(ctx, network.after, result, width, at)
    if not form.parallel and not form.residual_before_norm:
        result = graph.node("Add", [result, residual], at)
    return result


def _norm(ctx: Context, record: Norm, x: str, width: int, at: str) -> str:
    """A layer norm; of older operator sets in steps."""
    if ctx.opset >= _LAYER_NORM:
        return norm(ctx, record, x, width, module_of(record.weight) or at)
    graph = ctx.graph
    centred = graph.node("Sub", [x, graph.node("ReduceMean", [x], at, axes=[-1], keepdims=1)], at)
    variance = graph.node("ReduceMean", [graph.node("Mul", [centred, centred], at)], at, axes=[-1], keepdims=1)
    size = graph.node("Sqrt", [graph.node("Add", [variance, graph.number(record.epsilon, ctx.io)], at)], at)
    scaled = graph.node("Mul", [graph.node("Div", [centred, size], at), ctx.weights.value(record.weight, (width,))], at)
    return graph.node("Add", [scaled, ctx.weights.value(record.bias, (width,))], at)


def _gated(ctx: Context, result: str, gate: str, width: int, at: str) -> str:
    """``result`` times the mean of ``sigmoid(gate)`` over the tokens of each row of the batch, padding left out."""
    graph = ctx.graph
    share = graph.node("Sigmoid", [gate], at)
    real = graph.cast(graph.node("Unsqueeze", [ctx.real(), graph.ints(2)], at), ctx.io, at)
    share = graph.node("Mul", [ctx.batched(share, at) if ctx.flat else share, real], at)
    sums = [graph.node("ReduceSum", [values, graph.ints(1)], at, keepdims=1) for values in (share, real)]
    share = graph.node("Div", sums, at)
    product = graph.node("Mul", [ctx.batched(result, at) if ctx.flat else result, share], at)
    return ctx.reshaped(product, (-1, width), at) if ctx.flat else product


def _inner(ctx: Context, x: str, pair: tuple[Projection, Projection], activation: Activation) -> str:
    at = module_of(pair[0].weight)
    return _affine(ctx, activate(ctx, activation, _affine(ctx, x, pair[0]), at), pair[1])


def _affine(ctx: Context, x: str, projection: Projection) -> str:
    at = module_of(projection.weight)
    weight = ctx.weights.value(projection.weight, (projection.inputs, projection.outputs))
    y = ctx.graph.node("MatMul", [x, weight], at)
    return ctx.graph.node("Add", [y, ctx.weights.value(projection.bias, (projection.outputs,))], at)


def couple(ctx: Context, network: Coupling, x: str) -> str:
    """The forward of an invertible network; without inner values it adds nothing."""
    return _coupled(ctx, network, x, "Add", (0, 1))


def uncouple(ctx: Context, network: Coupling, x: str) -> str:
    """Its inverse: the same steps taken back, the last one first."""
    return _coupled(ctx, network, x, "Sub", (1, 0))


def _coupled(ctx: Context, network: Coupling, x: str, op: str, order: tuple[int, int]) -> str:
    """Add to each half of `x`, or subtract, what a bottleneck makes of the other half as it is by then."""
    halves, pairs = _halves(ctx, network, x), (network.first, network.second)
    for own in order:
        inner = _inner(ctx, halves[1 - own], pairs[own], network.activation)
        halves[own] = ctx.graph.node(op, [halves[own], inner], network.module)
    return ctx.graph.node("Concat", halves, network.module, axis=-1)


def _halves(ctx: Context, network: Coupling, x: str) -> list[str]:
    sizes = ctx.graph.ints(network.width // 2, network.width - network.width // 2)
    return ctx.graph.several("Split", [x, sizes], network.module, ("*", "*"), axis=-1)
