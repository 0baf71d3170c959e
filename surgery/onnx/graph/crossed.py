# SPDX-License-Identifier: Apache-2.0
"""The decoder of an encoder-decoder: its layers look at a cache of their own, and at the encoder's result.

Names of inputs and outputs are optimum's, which programs look for. The first run reads the encoder's result and gives out
what every layer makes of it, keys and values, together with the cache; later runs take both and grow the cache alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from surgery.onnx.graph.attention import project, split
from surgery.onnx.graph.context import Context, ResidualStream, module_of
from surgery.onnx.graph.decoder import embedded
from surgery.onnx.graph.dims import BATCH
from surgery.onnx.graph.heads import add_head
from surgery.onnx.graph.layers import Body, last_states, layer_steps
from surgery.onnx.graph.linear import declared_slot, linear
from surgery.onnx.graph.pair_names import MASK, STATES
from surgery.onnx.graph.relative import masked_bias, relative_bias
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Attention, LanguageHead, Model, Projection, RelativeBias

__all__ = ["crossed_decoder"]

OWN, PAST_OWN, READ = "decoder_sequence_length", "past_decoder_sequence_length", "encoder_sequence_length"
_SIDES = ("decoder", "encoder")


def crossed_decoder(ctx: Context, model: Model, *, begun: bool) -> None:
    """Build the graph of the first run, or, once it has `begun`, of all others.

    Inputs are ``input_ids (B, S)``, ``encoder_attention_mask (B, E)`` unless the encoder reads sound, and
    ``encoder_hidden_states (B, E, D)``, or the past of both kinds ``(B, heads, tokens, head_dim)``. Outputs are ``logits
    (B, S, V)`` and the present: of the encoder's keys and values only where they were made.

    Raises:
        FitError: a tensor is missing or misshapen.
    """
    if not isinstance(model.head, LanguageHead) or model.encoder is None:
        raise FitError("this decoder has a head for a task other than language modelling", file="config.json")
    graph = ctx.graph
    sounds = model.encoder.embedding.stem is not None
    mask = "" if sounds else graph.input(MASK, DType.I64, (BATCH, READ))
    graph.input(ctx.ids, DType.I64, (BATCH, OWN))
    if begun:
        for number, layer in enumerate(model.layers):
            for side in _SIDES:
                shape = (
                    BATCH,
                    layer.attention.kv_heads,
                    PAST_OWN if side == "decoder" else READ,
                    layer.attention.head_dim,
                )
                for part in ("key", "value"):
                    graph.input(f"past_key_values.{number}.{side}.{part}", ctx.io, shape)
        states = ""
    else:
        width = model.encoder.hidden
        states = graph.input(STATES, ctx.io, (BATCH, READ, width))
    reading = _Reading(ctx, mask, states, "past_key_values.0.decoder.key" if begun else "")
    stream = ResidualStream(embedded(ctx, model, lambda: reading.positions))
    for number, layer in enumerate(model.layers):
        assert layer.cross is not None
        own = _own(ctx, layer.attention, reading, number, begun=begun)
        crossed = _crossed(ctx, layer.cross.attention, reading, number, begun=begun)
        stream = layer_steps(ctx, model, layer, stream, own, crossed)
    add_head(ctx, model, last_states(ctx, model, stream))
    if not ctx.keep_logits:
        graph.proto.output[0].type.tensor_type.shape.dim[1].dim_param = OWN
    for number, layer in enumerate(model.layers):
        for side in _SIDES[:1] if begun else _SIDES:
            tokens = READ if side == "encoder" else f"{PAST_OWN} + {OWN}" if begun else OWN
            shape = (BATCH, layer.attention.kv_heads, tokens, layer.attention.head_dim)
            for part in ("key", "value"):
                graph.output(f"present.{number}.{side}.{part}", ctx.io, shape)


class _Reading:
    """What all layers share: places of new tokens and of all, and the masks of both kinds of attention."""

    def __init__(self, ctx: Context, mask: str, states: str, past: str) -> None:
        self._ctx, self._mask, self._past = ctx, mask, past
        self.states = states
        self._biased: dict[RelativeBias | None, str] = {}

    @cached_property
    def rows(self) -> str:
        """The encoder's result in the rank of hidden states."""
        if not self._ctx.flat:
            return self.states
        width = self._ctx.graph.node("Shape", [self.states], "", start=2, end=3)
        shape = self._ctx.graph.node("Concat", [self._ctx.graph.ints(-1), width], "", axis=0)
        return self._ctx.graph.node("Reshape", [self.states, shape], "")

    def as_read(self, value: str, at: str) -> str:
        """What was made of `rows`, ``(B, E, ...)``."""
        if not self._ctx.flat:
            return value
        return self._ctx.graph.node("Reshape", [value, self._read_shape], at)

    @cached_property
    def _read_shape(self) -> str:
        shape = self._ctx.graph.node("Shape", [self.states], "", start=0, end=2)
        return self._ctx.graph.node("Concat", [shape, self._ctx.graph.ints(-1)], "", axis=0)

    @cached_property
    def _new(self) -> str:
        """Places of the new tokens ``(S,)``."""
        graph = self._ctx.graph
        begin: str = graph.number(0, DType.I64)
        if self._past:
            begin = graph.node("Squeeze", [graph.node("Shape", [self._past], "", start=2, end=3)], "")
        return graph.node("Range", [begin, self._end, graph.number(1, DType.I64)], "")

    @cached_property
    def _end(self) -> str:
        graph = self._ctx.graph
        new = graph.node("Shape", [self._ctx.ids], "", start=1, end=2)
        if self._past:
            new = graph.node("Add", [new, graph.node("Shape", [self._past], "", start=2, end=3)], "")
        return graph.node("Squeeze", [new], "")

    @cached_property
    def _all(self) -> str:
        """Places of all tokens ``(T,)``."""
        graph = self._ctx.graph
        return graph.node("Range", [graph.number(0, DType.I64), self._end, graph.number(1, DType.I64)], "")

    @cached_property
    def positions(self) -> str:
        """Places of the new tokens, for every row ``(B, S)``."""
        graph = self._ctx.graph
        return graph.node("Expand", [self._new, graph.node("Shape", [self._ctx.ids], "")], "")

    def own(self, record: Attention) -> str:
        """The mask of a layer's attention to the tokens so far, of four axes: bool, or the layer's bias and -inf."""
        if record.bias not in self._biased:
            graph = self._ctx.graph
            keys = graph.node("Unsqueeze", [self._all, graph.ints(0)], "")
            queries = graph.node("Unsqueeze", [self._new, graph.ints(1)], "")
            value = graph.node("LessOrEqual", [keys, queries], "")
            if record.bias is not None:
                bias = relative_bias(self._ctx, record.bias, record.heads, self._new, self._all)
                value = graph.node("Unsqueeze", [masked_bias(self._ctx, bias, value), graph.ints(0)], "")
            else:
                value = graph.node("Unsqueeze", [value, graph.ints(0, 1)], "")
            self._biased[record.bias] = value
        return self._biased[record.bias]

    @cached_property
    def read(self) -> str:
        """Which of the encoder's tokens are none of padding ``(B, 1, S, E)``, bool; empty for sound, which has none."""
        if not self._mask:
            return ""
        graph = self._ctx.graph
        real = graph.node("Unsqueeze", [graph.cast(self._mask, DType.BOOL, ""), graph.ints(1, 2)], "")
        new = graph.node("Shape", [self._ctx.ids], "", start=1, end=2)
        shape = graph.node("Concat", [graph.ints(1, 1), new, graph.ints(1)], "", axis=0)
        return graph.node("Expand", [real, shape], "")


def _own(ctx: Context, record: Attention, reading: _Reading, number: int, *, begun: bool) -> Body:
    at = module_of(module_of(record.output.weight))
    past = [f"past_key_values.{number}.decoder.{part}" for part in ("key", "value")] if begun else []

    def attend(x: str, alpha: float) -> str:
        parts = split(ctx, record, project(ctx, record, x, at), at)
        q, k, v = (ctx.batched(part, at) if ctx.flat else part for part in parts)
        outputs = ("*", *(f"present.{number}.decoder.{part}" for part in ("key", "value")))
        y = _attention(ctx, record, [q, k, v, reading.own(record), *past], at, outputs)
        return _output(ctx, record, y, at, alpha)

    return attend


def _crossed(ctx: Context, record: Attention, reading: _Reading, number: int, *, begun: bool) -> Body:
    at = module_of(module_of(record.output.weight))

    def attend(x: str, alpha: float) -> str:
        q = linear(ctx, record.inputs[0], x)
        q = ctx.batched(q, at) if ctx.flat else q
        if not begun:
            k, v = (reading.as_read(linear(ctx, part, reading.rows), at) for part in record.inputs[1:])
            outputs = ("*", *(f"present.{number}.encoder.{part}" for part in ("key", "value")))
            y = _attention(ctx, record, [q, k, v, reading.read], at, outputs)
            return _output(ctx, record, y, at, alpha)
        for part in record.inputs[1:]:
            _declare(ctx, part)
        heads = ctx.graph.node("Reshape", [q, ctx.graph.ints(0, 0, record.heads, record.head_dim)], at)
        heads = ctx.graph.node("Transpose", [heads], at, perm=[0, 2, 1, 3])
        kept = [f"past_key_values.{number}.encoder.{part}" for part in ("key", "value")]
        inputs = [heads, *kept, reading.read]
        y = ctx.graph.node("Attention", inputs, at, scale=float(record.scale))
        y = ctx.graph.node("Transpose", [y], at, perm=[0, 2, 1, 3])
        y = ctx.graph.node("Reshape", [y, ctx.graph.ints(0, 0, record.output.inputs)], at)
        return _output(ctx, record, y, at, alpha)

    return attend


def _attention(ctx: Context, record: Attention, inputs: Sequence[str], at: str, outputs: Sequence[str]) -> str:
    return ctx.graph.several(
        "Attention",
        inputs,
        at,
        outputs,
        q_num_heads=record.heads,
        kv_num_heads=record.kv_heads,
        scale=float(record.scale),
    )[0]


def _output(ctx: Context, record: Attention, y: str, at: str, alpha: float) -> str:
    return linear(ctx, record.output, ctx.reshaped(y, (-1, record.output.inputs), at) if ctx.flat else y, alpha=alpha)


def _declare(ctx: Context, projection: Projection) -> None:
    """The inputs of a projection that this graph has no use for, so that adapters fit all graphs of the decoder."""
    if projection.weight in ctx.slotted:
        declared_slot(ctx, projection.weight, projection.inputs, projection.outputs)
    if projection.bias in ctx.weights.replaceable.names:
        ctx.weights.value(projection.bias, (projection.outputs,))
