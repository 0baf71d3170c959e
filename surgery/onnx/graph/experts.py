# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts: in one operator where that is exact, else from operators that every runtime has.

Of those each expert computes the tokens that chose it, and no others: tokens are sorted by their experts, cut into one piece per
expert, some of them empty, and put back. Every expert's weights are read where they lie, whether each has tensors of its own or
all are stacked in one. com.microsoft.MoE would need them stacked, in an order that no checkpoint has, so they would be copied
(docs/adr/0047); codes are written anyway, so they may be (0050).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from surgery.onnx.graph.context import Context, module_of
from surgery.onnx.graph.fused_experts import expert_stacks, fused_experts
from surgery.onnx.graph.linear import linear
from surgery.onnx.graph.mlp import mlp
from surgery.onnx.graph.stored_experts import stored_at_once, stored_experts
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import Experts

__all__ = ["experts"]

_NEVER = -np.inf


def experts(ctx: Context, record: Experts, x: str, width: int, *, alpha: float = 1.0) -> str:
    """``alpha`` times the weighted sum of the chosen experts' results and the shared expert's."""
    graph, at = ctx.graph, module_of(module_of(record.router.weight))
    rows = x if ctx.flat else ctx.reshaped(x, (-1, width), at)
    stacks = expert_stacks(ctx, record)
    if stacks is None and not stored_at_once(ctx, record):
        y = _one_by_one(ctx, record, rows, width, at, alpha)
    else:
        if stacks is not None:
            y = fused_experts(ctx, record, stacks, rows, _routing(ctx, record, rows, at), at)
        else:
            y = stored_experts(ctx, record, rows, _logits(ctx, record, rows), at)
        y = graph.node("Mul", [y, graph.number(alpha * record.scale, ctx.io)], at) if alpha * record.scale != 1.0 else y
    y = y if ctx.flat else ctx.batched(y, at)
    if record.shared is None:
        return y
    shared = mlp(ctx, record.shared, x, alpha=alpha)
    if record.shared_gate is not None:
        gate = graph.node("Sigmoid", [linear(ctx, record.shared_gate, x)], at)
        shared = graph.node("Mul", [shared, gate], at)
    return graph.node("Add", [y, shared], at)


def _one_by_one(ctx: Context, record: Experts, rows: str, width: int, at: str, alpha: float) -> str:
    """``alpha`` times the weighted sum of the chosen experts' results ``(N, D)``."""
    graph = ctx.graph
    chosen, weights = _choice(ctx, record, rows, at)
    pieces, places = _sorted_pieces(ctx, record, rows, chosen, at)
    fused = ctx.target.name != "portable" and ctx.target.linear != "matmul"
    inside = replace(ctx, target=replace(ctx.target, linear="fused")) if fused else ctx
    done = [mlp(inside, one, piece, alpha=alpha) for one, piece in zip(record.experts, pieces, strict=True)]
    joined = graph.node("Concat", done, at, axis=0) if len(done) > 1 else done[0]
    each = ctx.reshaped(graph.node("Gather", [joined, places], at, axis=0), (-1, record.top, width), at)
    weighted = graph.node("Mul", [each, graph.node("Unsqueeze", [weights, graph.ints(2)], at)], at)
    return graph.node("ReduceSum", [weighted, graph.ints(1)], at, keepdims=0)


def _routing(ctx: Context, record: Experts, rows: str, at: str) -> tuple[str, str]:
    """What QMoE takes: what decides the choice, and the weights of all experts; an empty name for the softmax of the chosen."""
    graph, logits = ctx.graph, _logits(ctx, record, rows)
    limited = record.correction or record.best_groups < record.groups
    if record.scoring == "softmax" and record.normalised and not limited and not record.floor:
        return logits, ""
    scores, wanted = _scores(ctx, record, logits, at)
    if record.normalised and record.floor:
        _, chosen = graph.several("TopK", [wanted, graph.ints(record.top)], at, ("*", "*"), axis=-1)
        weights = graph.node("GatherElements", [scores, chosen], at, axis=-1)
        scores = graph.node("Div", [scores, _total(ctx, record, weights, at)], at)
    return wanted, scores


def _choice(ctx: Context, record: Experts, rows: str, at: str) -> tuple[str, str]:
    """The numbers of the chosen experts ``(N, top)``, int64, and their weights in the graph's type."""
    graph = ctx.graph
    scores, wanted = _scores(ctx, record, _logits(ctx, record, rows), at)
    top = graph.ints(record.top)
    weights, chosen = graph.several("TopK", [wanted, top], at, ("*", "*"), axis=-1)
    if wanted != scores:
        weights = graph.node("GatherElements", [scores, chosen], at, axis=-1)
    if record.normalised:
        weights = graph.node("Div", [weights, _total(ctx, record, weights, at)], at)
    if record.scale != 1.0:
        weights = graph.node("Mul", [weights, graph.number(record.scale, DType.F32)], at)
    return chosen, weights if ctx.io is DType.F32 else graph.cast(weights, ctx.io, at)


def _total(ctx: Context, record: Experts, weights: str, at: str) -> str:
    """What the weights of the chosen are divided by."""
    total = ctx.graph.node("ReduceSum", [weights, ctx.graph.ints(-1)], at, keepdims=1)
    return ctx.graph.node("Max", [total, ctx.graph.number(record.floor, DType.F32)], at) if record.floor else total


def _scores(ctx: Context, record: Experts, logits: str, at: str) -> tuple[str, str]:
    """The score of every expert ``(N, experts)``, and what decides the choice."""
    graph = ctx.graph
    softmax = record.scoring == "softmax"
    scores = graph.node("Softmax", [logits], at, axis=-1) if softmax else graph.node("Sigmoid", [logits], at)
    wanted = scores
    if record.correction:
        shape = (*((1,) if record.correction_row else ()), len(record.experts))
        wanted = graph.node("Add", [wanted, ctx.weights.exact(record.correction, shape)], at)
    if record.best_groups < record.groups:
        wanted = _of_best_groups(ctx, record, wanted, at)
    return scores, wanted


def _logits(ctx: Context, record: Experts, rows: str) -> str:
    """One float32 number per token and expert ``(N, experts)``."""
    router = record.router
    at = module_of(router.weight)
    if ctx.io is DType.F32 or not record.precise or router.weight in ctx.slotted:
        logits = linear(ctx, router, rows)
        return logits if ctx.io is DType.F32 else ctx.graph.cast(logits, DType.F32, at)
    weight = ctx.weights.exact(router.weight, (router.outputs, router.inputs))
    bias = ctx.weights.exact(router.bias, (router.outputs,)) if router.bias else ""
    return ctx.graph.node("Gemm", [ctx.graph.cast(rows, DType.F32, at), weight, bias], at, transB=1)


def _of_best_groups(ctx: Context, record: Experts, wanted: str, at: str) -> str:
    """`wanted`, and minus infinity for the experts of other groups."""
    graph = ctx.graph
    grouped = ctx.reshaped(wanted, (-1, record.groups, len(record.experts) // record.groups), at)
    considered = 1 if record.group_score == "best" else 2
    best, _ = graph.several("TopK", [grouped, graph.ints(considered)], at, ("*", "*"), axis=-1)
    scores = graph.node("ReduceSum", [best, graph.ints(-1)], at, keepdims=0)
    _, groups = graph.several("TopK", [scores, graph.ints(record.best_groups)], at, ("*", "*"), axis=-1)
    numbers = graph.constant(np.arange(record.groups, dtype=np.int64).reshape(1, 1, -1))
    same = graph.node("Equal", [graph.node("Unsqueeze", [groups, graph.ints(2)], at), numbers], at)
    hits = graph.node("ReduceSum", [graph.cast(same, DType.I64, at), graph.ints(1)], at, keepdims=0)
    kept = graph.cast(graph.node("Unsqueeze", [hits, graph.ints(2)], at), DType.BOOL, at)
    limited = graph.node("Where", [kept, grouped, graph.number(_NEVER, DType.F32)], at)
    return ctx.reshaped(limited, (-1, len(record.experts)), at)


def _sorted_pieces(ctx: Context, record: Experts, rows: str, chosen: str, at: str) -> tuple[list[str], str]:
    """The rows of each expert, and where the result of every choice, in order, lies among theirs one after the other."""
    graph = ctx.graph
    flat = ctx.reshaped(chosen, (-1,), at)
    number = graph.node("Shape", [flat], at)
    order = _argsort(ctx, flat, number, at)
    tokens = graph.node("Div", [order, graph.number(record.top, DType.I64)], at)
    # onnxruntime's planner compares each value of known rank with all that were freed before: at thousands of pieces that takes
    # minutes. A Squeeze of an axis that only the run tells (0, the least of a permutation) leaves the rank of the pieces open.
    gathered = graph.node("Gather", [rows, graph.node("Unsqueeze", [tokens, graph.ints(0)], at)], at, axis=0)
    first = graph.node("ReduceMin", [order], at, keepdims=1)
    gathered = graph.node("Squeeze", [gathered, first], at)
    if len(record.experts) == 1:
        return [gathered], _argsort(ctx, order, number, at)
    numbers = graph.constant(np.arange(len(record.experts), dtype=np.int64))
    same = graph.node("Equal", [graph.node("Unsqueeze", [flat, graph.ints(1)], at), numbers], at)
    counts = graph.node("ReduceSum", [graph.cast(same, DType.I64, at), graph.ints(0)], at, keepdims=0)
    pieces = graph.several("Split", [gathered, counts], at, ("*",) * len(record.experts), axis=0)
    return pieces, _argsort(ctx, order, number, at)


def _argsort(ctx: Context, values: str, number: str, at: str) -> str:
    """Where the values lie in ascending order."""
    return ctx.graph.several("TopK", [values, number], at, ("*", "*"), axis=0, largest=0)[1]
