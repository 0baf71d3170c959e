# SPDX-License-Identifier: Apache-2.0
"""The graph of an encoder: every token sees every other token that is not padding."""

from __future__ import annotations

from surgery.onnx.graph.attention import normed, project, rotated, split
from surgery.onnx.graph.audio import heard
from surgery.onnx.graph.context import Context, ResidualStream, module_of
from surgery.onnx.graph.convolution import convolved
from surgery.onnx.graph.disentangled import DistanceScores
from surgery.onnx.graph.embedding import encoder_rows
from surgery.onnx.graph.heads import add_head
from surgery.onnx.graph.layers import Body, last_states, layer_steps
from surgery.onnx.graph.linear import linear
from surgery.onnx.graph.modules import couple
from surgery.onnx.graph.norm import residual_norm
from surgery.onnx.graph.patches import looked_at
from surgery.onnx.graph.relative import masked_bias
from surgery.onnx.graph.seen_keys import SeenKeys
from surgery.onnx.graph.virtual_tokens import in_front, keys_in_front
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import Attention, ClassifierHead, Model, PooledHead

__all__ = ["encoder"]


def encoder(ctx: Context, model: Model, max_length: int) -> None:
    """Build the graph, for at most `max_length` positions.

    Inputs are ``input_ids``, ``attention_mask`` and, if the model has several token types, ``token_type_ids``, each
    ``(B, S)``, or ``(B, C, S)`` where choices are scored, ``input_features (B, bins, frames)``,
    or ``pixel_values (B, channels, height, width)``; outputs are those of
    the head.

    Raises:
        FitError: a tensor is missing or misshapen.
    """
    graph, record = ctx.graph, model.embedding
    mask = ""
    if record.stem is not None:
        stream = heard(ctx, model, record.stem)
    elif record.patches is not None:
        stream = looked_at(ctx, model, record.patches)
    else:
        ctx.choices = isinstance(model.head, ClassifierHead) and model.head.choices
        ctx.ids = ctx.per_token(ctx.ids)
        mask = ctx.per_token("attention_mask")
        if ctx.virtual.front:
            ctx.ids, mask = in_front(graph, ctx.ids, mask, model.vocabulary, ctx.virtual.front)
        ctx.real = lambda: graph.cast(mask, DType.BOOL, "")
        stream = encoder_rows(ctx, model)
    if (first := record.norm) is not None:
        width = model.embedded[-1]
        stream = ResidualStream(residual_norm(ctx, first, stream, width, module_of(first.weight), keep=False)[0])
    if record.projection is not None and record.projected == "norm":
        stream = ResidualStream(linear(ctx, record.projection, ctx.total(stream, module_of(record.projection.weight))))
    for network in record.couplings:
        stream = ResidualStream(couple(ctx, network, ctx.total(stream, network.module)))
    reads_padding = isinstance(model.head, PooledHead) and model.head.token == "last"
    seen = SeenKeys(ctx, mask, max_length, reads_padding=reads_padding)
    if mask:
        seen.allowed(model.layers[0].attention.window)  # in front of the layers, where graphs have always had it
    distances = DistanceScores(ctx, seen)
    for index, layer in enumerate(model.layers):
        before = stream
        attend = _attention(ctx, model, layer.attention, seen, distances, index)
        stream = layer_steps(ctx, model, layer, stream, attend)
        if index == 0 and model.convolution is not None:
            x, y = ctx.total(before, ""), ctx.total(stream, "")
            stream = ResidualStream(convolved(ctx, model.convolution, x, y, model.hidden))
    add_head(ctx, model, last_states(ctx, model, stream))


def _attention(
    ctx: Context, model: Model, record: Attention, seen: SeenKeys, distances: DistanceScores, layer: int
) -> Body:
    at = module_of(module_of(record.output.weight))

    def attend(x: str, alpha: float) -> str:
        parts = split(ctx, record, project(ctx, record, x, at), at)
        if record.q_bias or record.v_bias:
            parts = _biased(ctx, record, parts, at)
        if record.q_norm or record.k_norm:
            parts = normed(ctx, record, parts, at)
        if record.rope is not None:
            q, k, v = rotated(ctx, record, parts, seen, at)
        else:
            q, k, v = (ctx.batched(part, at) if ctx.flat else part for part in parts)
        if ctx.virtual.keys:
            k = keys_in_front(ctx.graph, ctx.virtual, ctx.io, layer, ctx.ids, "key", k, at)
            v = keys_in_front(ctx.graph, ctx.virtual, ctx.io, layer, ctx.ids, "value", v, at)
        if record.disentangled is not None:
            scores = distances.scores(record, q, k, model.hidden, at)
            mask = masked_bias(ctx, scores, seen.allowed(record.window))
        else:
            mask = seen.mask(record)
        y = ctx.graph.node(
            "Attention",
            [q, k, v, mask],
            at,
            q_num_heads=record.heads,
            kv_num_heads=record.kv_heads,
            scale=float(record.scale),
        )
        return linear(
            ctx, record.output, ctx.reshaped(y, (-1, record.output.inputs), at) if ctx.flat else y, alpha=alpha
        )

    return attend


def _biased(ctx: Context, record: Attention, parts: tuple[str, str, str], at: str) -> tuple[str, str, str]:
    """Queries and values with the biases that they have beside one projection for all."""

    def add(value: str, bias: str) -> str:
        if not bias:
            return value
        return ctx.graph.node("Add", [value, ctx.weights.value(bias, (record.heads * record.head_dim,))], at)

    return add(parts[0], record.q_bias), parts[1], add(parts[2], record.v_bias)
