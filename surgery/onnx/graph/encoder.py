# SPDX-License-Identifier: Apache-2.0
"""The graph of an encoder: every token sees every other token that is not padding."""

from __future__ import annotations

from surgery.onnx.graph.attention import project, split
from surgery.onnx.graph.context import Context, ResidualStream, module_of
from surgery.onnx.graph.embedding import encoder_rows
from surgery.onnx.graph.heads import add_head
from surgery.onnx.graph.layers import Body, layer_steps
from surgery.onnx.graph.linear import linear
from surgery.onnx.graph.modules import couple
from surgery.onnx.graph.norm import norm, residual_norm
from surgery.onnx.graph.virtual_tokens import in_front
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import Attention, ClassifierHead, Model

__all__ = ["encoder"]


def encoder(ctx: Context, model: Model) -> None:
    """Build the graph.

    Inputs are ``input_ids``, ``attention_mask`` and, if the model has several token types, ``token_type_ids``, each
    ``(B, S)``, or ``(B, C, S)`` where choices are scored; outputs are those of the head.

    Raises:
        FitError: a tensor is missing or misshapen.
    """
    graph = ctx.graph
    ctx.choices = isinstance(model.head, ClassifierHead) and model.head.choices
    ctx.ids = ctx.per_token(ctx.ids)
    mask = ctx.per_token("attention_mask")
    if ctx.virtual.front:
        ctx.ids, mask = in_front(graph, ctx.ids, mask, model.vocabulary, ctx.virtual.front)
    ctx.real = lambda: graph.cast(mask, DType.BOOL, "")
    stream = encoder_rows(ctx, model)
    if (first := model.embedding.norm) is not None:
        stream = ResidualStream(residual_norm(ctx, first, stream, model.hidden, module_of(first.weight), keep=False)[0])
    for network in model.embedding.couplings:
        stream = ResidualStream(couple(ctx, network, ctx.total(stream, network.module)))
    allowed = _allowed(ctx, mask)
    for layer in model.layers:
        stream = layer_steps(ctx, model, layer, stream, _attention(ctx, layer.attention, allowed))
    x = ctx.total(stream, "")
    if model.final_norm is not None:
        x = norm(ctx, model.final_norm, x, model.hidden, module_of(model.final_norm.weight))
    add_head(ctx, model, x)


def _allowed(ctx: Context, mask: str) -> str:
    """Visible keys ``(B, 1, S, S)``, bool: all tokens. Padding is never read, but it must see something."""
    token = ctx.graph.cast(mask, DType.BOOL, "")
    keys = ctx.graph.node("Unsqueeze", [token, ctx.graph.ints(1, 2)], "")
    padding = ctx.graph.node("Unsqueeze", [ctx.graph.node("Not", [token], ""), ctx.graph.ints(1, 3)], "")
    return ctx.graph.node("Or", [keys, padding], "")


def _attention(ctx: Context, record: Attention, allowed: str) -> Body:
    at = module_of(module_of(record.output.weight))

    def attend(x: str, alpha: float) -> str:
        parts = split(ctx, record, project(ctx, record, x, at), at)
        q, k, v = (ctx.batched(part, at) if ctx.flat else part for part in parts)
        y = ctx.graph.node(
            "Attention",
            [q, k, v, allowed],
            at,
            q_num_heads=record.heads,
            kv_num_heads=record.kv_heads,
            scale=float(record.scale),
        )
        return linear(
            ctx, record.output, ctx.reshaped(y, (-1, record.output.inputs), at) if ctx.flat else y, alpha=alpha
        )

    return attend
