# SPDX-License-Identifier: Apache-2.0
"""Operators that an older set does not have, in steps that it has.

It rewrites finished graphs, so that whatever builds them need not know for which runtime they are. A graph in steps is
slower than one with Attention, and right: it is what a runtime of before 2025 takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from surgery.onnx.graph.activation import gelu_in_steps
from surgery.onnx.graph.graph import END, Graph
from surgery.onnx.graph.opset import NEWEST, OLDEST, least_opset, needs
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError

__all__ = ["check_opset", "lower"]

_BOOLEAN = ("And", "Or", "Not", "Xor", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "IsNaN")
_SAME_TYPE = ("Unsqueeze", "Squeeze", "Expand", "Slice", "Reshape", "Concat", "Transpose", "Gather", "Tile", "Identity")
_REDUCED = 18  # the set from which on axes are an input


def check_opset(opset: int) -> None:
    """Check that graphs can be made for this set of operators.

    Raises:
        FitError: they cannot.
    """
    if not OLDEST <= opset <= NEWEST:
        raise FitError(f"graphs are made for operators of opset {OLDEST} to {NEWEST}, not {opset}")


def lower(graph: Graph, opset: int, io: DType) -> None:
    """Rewrite what `opset` does not have.

    Raises:
        FitError: an operator needs a newer set and has no other form.
    """
    nodes = list(graph.proto.node)
    if least_opset(graph.proto, io) <= opset:
        return
    steps = _Steps(graph, opset, io, {name: node for node in nodes for name in node.output})
    copies = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.proto.node[:]
    for node in copies:
        rewrite = _REWRITES.get(node.op_type) if node.domain == "" and needs(node, io) > opset else None
        if rewrite is not None:
            rewrite(steps, node, _attributes(node))
        elif node.op_type.startswith("Reduce") and needs(node, io) > opset:
            _reduce(steps, node, _attributes(node))
        else:
            graph.proto.node.append(node)
    graph.drop_unused()
    for node in graph.proto.node:
        if (needed := needs(node, io)) > opset:
            raise FitError(
                f"{node.op_type} needs opset {needed}", tensor=node.name, hint=f"`opset={needed}`, or another target"
            )


@dataclass(frozen=True)
class _Steps:
    """A graph that is being rewritten.

    Attributes:
        graph: The graph.
        opset: The set of operators to use.
        io: Type of hidden states.
        makers: The original node that makes each value.
        compared: Which numbers of a mask are no mask, by its name: layers share masks.
    """

    graph: Graph
    opset: int
    io: DType
    makers: Mapping[str, onnx.NodeProto]
    compared: dict[str, str] = field(default_factory=dict)

    @property
    def least(self) -> float:
        """The least number of hidden states; bfloat16 has no type in numpy."""
        if self.io is DType.BF16:
            return -3e38
        return float(np.finfo(np.float16 if self.io is DType.F16 else np.float32).min)

    def seen(self, mask: str) -> str:
        """Where a mask of numbers lets something be seen: above the least number, as onnxruntime has it."""
        if mask not in self.compared:
            least = self.graph.number(self.least, self.io)
            self.compared[mask] = self.graph.node("Greater", [mask, least], mask)
        return self.compared[mask]

    def is_bool(self, name: str) -> bool:
        """Whether a value is boolean."""
        node = self.makers.get(name)
        if node is None:
            values = [value for value in self.graph.proto.input if value.name == name]
            return bool(values) and values[0].type.tensor_type.elem_type == onnx.TensorProto.BOOL
        if node.op_type == "Cast":
            return bool(_attributes(node)["to"] == onnx.TensorProto.BOOL)
        if node.op_type == "Where":
            return self.is_bool(node.input[1])
        return node.op_type in _BOOLEAN or (node.op_type in _SAME_TYPE and self.is_bool(node.input[0]))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _rms_norm(steps: _Steps, node: onnx.NodeProto, attributes: Mapping[str, Any]) -> None:
    """``x / sqrt(mean(x^2) + epsilon) * scale``, in float32 up to the scale."""
    graph, at = steps.graph, node.name
    if attributes.get("axis", -1) != -1:
        raise FitError(f"RMSNormalization over several axes needs opset {NEWEST}", tensor=at)
    x, scale = node.input
    short = steps.io is not DType.F32
    wide = graph.cast(x, DType.F32, at) if short else x
    square = graph.node("Mul", [wide, wide], at)
    if steps.opset < _REDUCED:
        mean = graph.node("ReduceMean", [square], at, axes=[-1], keepdims=1)
    else:
        mean = graph.node("ReduceMean", [square, graph.ints(-1)], at, keepdims=1)
    epsilon = graph.number(float(attributes.get("epsilon", 1e-5)), DType.F32)
    root = graph.node("Sqrt", [graph.node("Add", [mean, epsilon], at)], at)
    y = graph.node("Div", [wide, root], at)
    if short:
        y = graph.cast(y, steps.io, at)
    graph.node("Mul", [y, scale], at, out=node.output[0])


def _rotary(steps: _Steps, node: onnx.NodeProto, attributes: Mapping[str, Any]) -> None:
    """Rotate pairs of values: of the two halves, or neighbours where `interleaved`."""
    graph, at = steps.graph, node.name
    x, cos, sin = node.input[:3]
    heads, dims = int(attributes.get("num_heads", 0)), int(attributes.get("rotary_embedding_dim", 0))
    turned = bool(attributes.get("interleaved", 0))
    axis = 2 if heads else 1
    if heads:
        x = graph.node("Reshape", [x, graph.ints(0, 0, heads, -1)], at)
    tables = [cos, sin]
    if len(node.input) > 3:
        tables = [graph.node("Gather", [table, node.input[3]], at, axis=0) for table in tables]
    cos, sin = (graph.node("Unsqueeze", [table, graph.ints(axis)], at) for table in tables)
    rest = ""
    if dims:
        rest = graph.node("Slice", [x, graph.ints(dims), graph.ints(END), graph.ints(-1)], at)
        x = graph.node("Slice", [x, graph.ints(0), graph.ints(dims), graph.ints(-1)], at)
    if turned:
        pairs = graph.node("Reshape", [x, graph.ints(0, 0, 0, -1, 2)], at)
        first, second = (graph.node("Gather", [pairs, graph.number(n, DType.I64)], at, axis=-1) for n in (0, 1))
    else:
        number: dict[str, Any] = {} if steps.opset < _REDUCED else {"num_outputs": 2}
        first, second = graph.several("Split", [x], at, ("*", "*"), axis=-1, **number)

    def product(a: str, b: str) -> str:
        return graph.node("Mul", [a, b], at)

    halves = [
        graph.node("Sub", [product(first, cos), product(second, sin)], at),
        graph.node("Add", [product(second, cos), product(first, sin)], at),
    ]
    if turned:
        halves = [graph.node("Unsqueeze", [half, graph.ints(-1)], at) for half in halves]
        flat = graph.node("Concat", halves, at, axis=-1)
        halves = [graph.node("Reshape", [flat, graph.ints(0, 0, 0, -1)], at)]
    parts = [*halves, *([rest] if rest else [])]
    if heads:
        y = graph.node("Concat", parts, at, axis=-1) if len(parts) > 1 else parts[0]
        graph.node("Reshape", [y, graph.ints(0, 0, -1)], at, out=node.output[0])
    else:
        graph.node("Concat", parts, at, axis=-1, out=node.output[0])


def _attention(steps: _Steps, node: onnx.NodeProto, attributes: Mapping[str, Any]) -> None:
    """``softmax(cap(scale q k^T) + mask) v``; a cap comes before the mask, as in onnxruntime."""
    graph, at = steps.graph, node.name
    inputs = [*node.input, *[""] * (6 - len(node.input))]
    q, k, v, mask = inputs[:4]
    heads, kv_heads = int(attributes.get("q_num_heads", 0)), int(attributes.get("kv_num_heads", 0))
    if attributes.get("is_causal") or "scale" not in attributes or len(node.output) > 3:
        raise FitError(f"this form of Attention needs opset {NEWEST}", tensor=at)

    def apart(value: str, number: int) -> str:
        if not number:  # it has four axes
            return value
        split = graph.node("Reshape", [value, graph.ints(0, 0, number, -1)], at)
        return graph.node("Transpose", [split], at, perm=[0, 2, 1, 3])

    def cached(value: str, past: str, place: int) -> str:
        present = node.output[place] if len(node.output) > place else ""
        if past:
            return graph.node("Concat", [past, value], at, axis=2, out=present or "*")
        return graph.node("Identity", [value], at, out=present) if present else value

    q = apart(q, heads)
    k, v = cached(apart(k, kv_heads), inputs[4], 1), cached(apart(v, kv_heads), inputs[5], 2)
    if heads != kv_heads:
        each = graph.ints(*(head // (heads // kv_heads) for head in range(heads)))
        k, v = (graph.node("Gather", [value, each], at, axis=1) for value in (k, v))
    q = graph.node("Mul", [q, graph.number(float(attributes["scale"]), steps.io)], at)
    scores = graph.node("MatMul", [q, graph.node("Transpose", [k], at, perm=[0, 1, 3, 2])], at)
    if cap := float(attributes.get("softcap", 0.0)):
        limit = graph.number(cap, steps.io)
        scores = graph.node("Mul", [graph.node("Tanh", [graph.node("Div", [scores, limit], at)], at), limit], at)
    seen = ""
    if mask and steps.is_bool(mask):
        seen, scores = mask, graph.node("Where", [mask, scores, graph.number(steps.least, steps.io)], at)
    elif mask:
        seen, scores = steps.seen(mask), graph.node("Add", [scores, mask], at)
    shares = graph.node("Softmax", [scores], at, axis=-1)
    if seen:  # a query that sees nothing has a result of 0; of -inf alone Softmax makes NaN, of equal numbers a mean
        shares = graph.node("Where", [seen, shares, graph.number(0.0, steps.io)], at)
    if not heads:
        graph.node("MatMul", [shares, v], at, out=node.output[0])
        return
    y = graph.node("MatMul", [shares, v], at)
    together = graph.node("Transpose", [y], at, perm=[0, 2, 1, 3])
    graph.node("Reshape", [together, graph.ints(0, 0, -1)], at, out=node.output[0])


def _gelu(steps: _Steps, node: onnx.NodeProto, attributes: Mapping[str, Any]) -> None:
    tanh = attributes.get("approximate", b"none") == b"tanh"
    gelu_in_steps(steps.graph, steps.io, node.input[0], node.name, tanh=tanh, out=node.output[0])


def _split(steps: _Steps, node: onnx.NodeProto, attributes: Mapping[str, Any]) -> None:
    """Equal parts, whose number was not an attribute before."""
    axis = int(attributes.get("axis", 0))
    steps.graph.several("Split", [node.input[0]], node.name, list(node.output), axis=axis)


def _reduce(steps: _Steps, node: onnx.NodeProto, attributes: Mapping[str, Any]) -> None:
    """Axes as an attribute instead of an input."""
    tensors = [one for one in steps.graph.proto.initializer if one.name == node.input[1]]
    if not tensors:
        steps.graph.proto.node.append(node)
        return
    axes = [int(axis) for axis in onnx.numpy_helper.to_array(tensors[0])]
    keep = int(attributes.get("keepdims", 1))
    steps.graph.node(node.op_type, [node.input[0]], node.name, out=node.output[0], axes=axes, keepdims=keep)


_REWRITES: dict[str, Callable[[_Steps, onnx.NodeProto, Mapping[str, Any]], None]] = {
    "Attention": _attention,
    "Gelu": _gelu,
    "RMSNormalization": _rms_norm,
    "RotaryEmbedding": _rotary,
    "Split": _split,
}
