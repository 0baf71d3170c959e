# SPDX-License-Identifier: Apache-2.0
"""Attention with a learned score for a key that has no value (attention sinks), where no operator has them.

GroupQueryAttention takes them as an input; Attention of opset 23 does not, so its steps are spelt out.
"""

from __future__ import annotations

import numpy as np

from surgery.onnx.graph.context import CacheValues, Context
from surgery.onnx.graph.frame import Frame
from surgery_formats.models.families.recipe import Attention

__all__ = ["attention_with_sinks"]


def attention_with_sinks(
    ctx: Context, record: Attention, parts: tuple[str, str, str], frame: Frame, cache: CacheValues | None, at: str
) -> str:
    """``softmax([scale q k^T + mask | sink])`` without its last column, times v ``(B, S, heads * head_dim)``."""
    graph, group = ctx.graph, record.heads // record.kv_heads
    q, k, v = (
        graph.node("Transpose", [ctx.reshaped(part, (0, 0, heads, record.head_dim), at)], at, perm=[0, 2, 1, 3])
        for part, heads in zip(parts, (record.heads, record.kv_heads, record.kv_heads), strict=True)
    )
    keys, values = k, v
    if cache is not None:
        keys = graph.node("Concat", [cache.past_key, k], at, out=cache.present_key, axis=2)
        values = graph.node("Concat", [cache.past_value, v], at, out=cache.present_value, axis=2)
    q = ctx.reshaped(q, (0, record.kv_heads, group, -1, record.head_dim), at)
    keys, values = (graph.node("Unsqueeze", [every, graph.ints(2)], at) for every in (keys, values))
    turned = graph.node("Transpose", [keys], at, perm=[0, 1, 2, 4, 3])
    scores = graph.node("MatMul", [graph.node("Mul", [q, graph.number(record.scale, ctx.io)], at), turned], at)
    allowed = graph.node("Unsqueeze", [frame.allowed(record.window), graph.ints(1)], at)
    scores = graph.node("Where", [allowed, scores, graph.number(-np.inf, ctx.io)], at)
    sinks = ctx.reshaped(ctx.weights.value(record.sinks, (record.heads,)), (1, record.kv_heads, group, 1, 1), at)
    shape = graph.node("Concat", [graph.node("Shape", [scores], at, start=0, end=4), graph.ints(1)], at, axis=0)
    scores = graph.node("Concat", [scores, graph.node("Expand", [sinks, shape], at)], at, axis=-1)
    weights = graph.node("Softmax", [scores], at, axis=-1)
    weights = graph.node("Slice", [weights, *(graph.ints(number) for number in (0, -1, -1))], at)
    mixed = ctx.reshaped(graph.node("MatMul", [weights, values], at), (0, record.heads, -1, record.head_dim), at)
    together = graph.node("Transpose", [mixed], at, perm=[0, 2, 1, 3])
    return ctx.reshaped(together, (0, 0, record.heads * record.head_dim), at)
