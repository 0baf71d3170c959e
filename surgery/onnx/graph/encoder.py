# SPDX-License-Identifier: Apache-2.0
"""The graph of an encoder: every token sees every other token that is not padding."""

from __future__ import annotations

from functools import cached_property

from surgery.onnx.graph.attention import project, split
from surgery.onnx.graph.context import Context, ResidualStream, module_of
from surgery.onnx.graph.dims import BATCH, SEQUENCE
from surgery.onnx.graph.embedding import encoder_rows
from surgery.onnx.graph.heads import classifier_head, hidden_head
from surgery.onnx.graph.layers import Body, layer_steps
from surgery.onnx.graph.linear import linear
from surgery.onnx.graph.modules import couple
from surgery.onnx.graph.norm import norm, residual_norm
from surgery.onnx.graph.relative import masked_bias, relative_bias
from surgery.onnx.graph.virtual_tokens import in_front
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Attention, ClassifierHead, HiddenHead, Model, RelativeBias

__all__ = ["SeenKeys", "encoder"]


def encoder(ctx: Context, model: Model) -> None:
    """Build the graph.

    Inputs are ``input_ids``, ``attention_mask`` and, if the model has several token types, ``token_type_ids``, each
    ``(B, S)``; outputs are those of the head.

    Raises:
        FitError: a tensor is missing or misshapen.
    """
    graph = ctx.graph
    graph.input(ctx.ids, DType.I64, (BATCH, SEQUENCE))
    mask = graph.input("attention_mask", DType.I64, (BATCH, SEQUENCE))
    if ctx.virtual.front:
        ctx.ids, mask = in_front(graph, ctx.ids, mask, model.vocabulary, ctx.virtual.front)
    ctx.real = lambda: graph.cast(mask, DType.BOOL, "")
    stream = encoder_rows(ctx, model)
    if (first := model.embedding.norm) is not None:
        stream = ResidualStream(residual_norm(ctx, first, stream, model.hidden, module_of(first.weight), keep=False)[0])
    for network in model.embedding.couplings:
        stream = ResidualStream(couple(ctx, network, ctx.total(stream, network.module)))
    seen = SeenKeys(ctx, mask)
    for layer in model.layers:
        stream = layer_steps(ctx, model, layer, stream, _attention(ctx, layer.attention, seen))
    x = ctx.total(stream, "")
    if model.final_norm is not None:
        x = norm(ctx, model.final_norm, x, model.hidden, module_of(model.final_norm.weight))
    match model.head:
        case ClassifierHead():
            classifier_head(ctx, model.head, x)
        case HiddenHead():
            hidden_head(ctx, model.head, x, model.hidden)
        case _:
            raise FitError("this encoder has a language-modelling head", file="config.json")


class SeenKeys:
    """What an encoder's queries make of each key: which they see, and what is added to the scores of those."""

    def __init__(self, ctx: Context, mask: str) -> None:
        self._ctx, self._mask = ctx, mask
        self._biased: dict[RelativeBias, str] = {}

    @cached_property
    def allowed(self) -> str:
        """Visible keys ``(B, 1, S, S)``, bool: all tokens. Padding is never read, but it must see something."""
        graph = self._ctx.graph
        token = graph.cast(self._mask, DType.BOOL, "")
        keys = graph.node("Unsqueeze", [token, graph.ints(1, 2)], "")
        padding = graph.node("Unsqueeze", [graph.node("Not", [token], ""), graph.ints(1, 3)], "")
        return graph.node("Or", [keys, padding], "")

    def mask(self, record: Attention) -> str:
        """The mask of a layer's attention: `allowed`, or its bias ``(B, heads, S, S)`` with -inf for what is not."""
        if record.bias is None:
            return self.allowed
        if record.bias not in self._biased:
            graph = self._ctx.graph
            size = graph.node("Squeeze", [graph.node("Shape", [self._mask], "", start=1, end=2)], "")
            places = graph.node("Range", [graph.number(0, DType.I64), size, graph.number(1, DType.I64)], "")
            bias = relative_bias(self._ctx, record.bias, record.heads, places, places)
            self._biased[record.bias] = masked_bias(self._ctx, bias, self.allowed)
        return self._biased[record.bias]


def _attention(ctx: Context, record: Attention, seen: SeenKeys) -> Body:
    at = module_of(module_of(record.output.weight))

    def attend(x: str, alpha: float) -> str:
        parts = split(ctx, record, project(ctx, record, x, at), at)
        q, k, v = (ctx.batched(part, at) if ctx.flat else part for part in parts)
        y = ctx.graph.node(
            "Attention",
            [q, k, v, seen.mask(record)],
            at,
            q_num_heads=record.heads,
            kv_num_heads=record.kv_heads,
            scale=float(record.scale),
        )
        return linear(
            ctx, record.output, ctx.reshaped(y, (-1, record.output.inputs), at) if ctx.flat else y, alpha=alpha
        )

    return attend
