# SPDX-License-Identifier: Apache-2.0
"""The embedding of a text, of the states of its tokens; pooled in float32, whatever the graph's type."""

from __future__ import annotations

import numpy as np

from surgery.onnx.graph.activation import activate
from surgery.onnx.graph.context import Context
from surgery.onnx.graph.linear import linear
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe_sentence import DenseStep, PoolingMode, SentenceHead

__all__ = ["sentence_embedding"]

_AT = "sentence"


def sentence_embedding(ctx: Context, record: SentenceHead, states: str) -> None:
    """Add the output ``sentence_embedding (B, E)``, of the states ``(B, S, D)``.

    Raises:
        FitError: there is a soft prompt in front, whose tokens are no part of the text.
    """
    if ctx.virtual.front:
        raise FitError("a soft prompt in front of a text that is pooled is not supported", hint="`task=` is another")
    pooling = _Pooling(ctx, _cast(ctx, states, ctx.io, DType.F32))
    pooled = [pooling.of(mode) for mode in record.modes]
    x = pooled[0] if len(pooled) == 1 else ctx.graph.node("Concat", pooled, _AT, axis=-1)
    x = _cast(ctx, x, DType.F32, ctx.io)
    for step in record.steps:
        if isinstance(step, DenseStep):
            x = linear(ctx, step.projection, x)
            x = x if step.activation is None else activate(ctx, step.activation, x, _AT)
        else:
            wide = _cast(ctx, x, ctx.io, DType.F32)
            length = ctx.graph.node("ReduceL2", [wide, ctx.graph.ints(-1)], _AT, keepdims=1)
            length = ctx.graph.node("Max", [length, ctx.graph.number(1e-12, DType.F32)], _AT)
            x = _cast(ctx, ctx.graph.node("Div", [wide, length], _AT), DType.F32, ctx.io)
    ctx.graph.node("Identity", [x], _AT, out="sentence_embedding")
    ctx.graph.output("sentence_embedding", ctx.io, (ctx.batch, record.width))


def _cast(ctx: Context, x: str, of: DType, to: DType) -> str:
    return x if of is to else ctx.graph.cast(x, to, _AT)


class _Pooling:
    """States ``(B, S, D)``, float32, and which of them are of tokens."""

    def __init__(self, ctx: Context, states: str) -> None:
        self._graph = graph = ctx.graph
        self._states = states
        self._real = ctx.real()
        length = graph.node("Squeeze", [graph.node("Shape", [states], _AT, start=1, end=2)], _AT)
        self._places = graph.node("Range", [graph.number(0, DType.I64), length, graph.number(1, DType.I64)], _AT)

    def of(self, mode: PoolingMode) -> str:
        """``(B, D)``, float32."""
        graph = self._graph
        if mode == "cls":
            return self._state_at(self._extreme("ReduceMin", 2**31 - 1))
        if mode == "lasttoken":
            return self._state_at(self._extreme("ReduceMax", -1))
        if mode == "max":
            real = graph.node("Unsqueeze", [self._real, graph.ints(2)], _AT)
            lowest = graph.constant(np.array(-np.inf, np.float32))
            return graph.node(
                "ReduceMax", [graph.node("Where", [real, self._states, lowest], _AT), graph.ints(1)], _AT, keepdims=0
            )
        weights = graph.cast(self._real, DType.F32, _AT)
        if mode == "weightedmean":
            first = self._extreme("ReduceMin", 2**31 - 1)
            counted = graph.node("Add", [graph.node("Sub", [self._places, first], _AT), graph.ints(1)], _AT)
            weights = graph.node("Mul", [weights, graph.cast(counted, DType.F32, _AT)], _AT)
        columns = graph.node("Unsqueeze", [weights, graph.ints(2)], _AT)
        total = graph.node(
            "ReduceSum", [graph.node("Mul", [self._states, columns], _AT), graph.ints(1)], _AT, keepdims=0
        )
        number = graph.node("ReduceSum", [weights, graph.ints(1)], _AT, keepdims=1)
        number = graph.node("Max", [number, graph.number(1e-9, DType.F32)], _AT)
        return graph.node(
            "Div", [total, graph.node("Sqrt", [number], _AT) if mode == "mean_sqrt_len_tokens" else number], _AT
        )

    def _extreme(self, op: str, other: int) -> str:
        """The first or last place of a token in each row ``(B, 1)``."""
        graph = self._graph
        places = graph.node("Where", [self._real, self._places, graph.number(other, DType.I64)], _AT)
        return graph.node(op, [places, graph.ints(1)], _AT, keepdims=1)

    def _state_at(self, place: str) -> str:
        return self._graph.node("GatherND", [self._states, place], _AT, batch_dims=1)
