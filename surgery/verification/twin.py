# SPDX-License-Identifier: Apache-2.0
"""A 16-bit graph as a float32 graph over the same bytes, which the CPU provider runs without intermediate rounding.

It is derived from the file to verify, not built anew, so that faults of the file remain.
"""

from __future__ import annotations

import numpy as np
import onnx

from surgery_formats.errors import MalformedError

__all__ = ["SHORT_TYPES", "float32_twin"]

_FLOAT = 1
SHORT_TYPES = (10, 16)
"""FLOAT16 and BFLOAT16."""
_Q_NORM, _K_NORM = 14, 15  # inputs of GroupQueryAttention that only CUDA supports


def float32_twin(graph: onnx.ModelProto, head_dim: int) -> onnx.ModelProto:
    """A copy of `graph` in which every 16-bit value is float32; norms inside a CUDA operator need `head_dim`.

    Raises:
        MalformedError: an operator lacks a required part.
    """
    twin = onnx.ModelProto()
    twin.CopyFrom(graph)
    body = twin.graph
    _widen_branches(body)
    nodes = [_unfuse_norms(node, head_dim) for node in body.node]
    wide = {tensor.name: f"{tensor.name}/float32" for tensor in body.initializer if tensor.data_type in SHORT_TYPES}
    defaults = {value.name for value in body.input} & set(wide)
    for value in (*body.input, *body.output):
        if value.type.tensor_type.elem_type in SHORT_TYPES:
            value.type.tensor_type.elem_type = _FLOAT
    for tensor in body.initializer:
        if tensor.name in defaults:  # a default of an input has the input's type
            _widen(tensor)
            del wide[tensor.name]
    casts = [onnx.helper.make_node("Cast", [name], [cast], to=_FLOAT) for name, cast in wide.items()]
    del body.node[:]
    body.node.extend(casts)
    for parts in nodes:
        for node in parts:
            for inner in (inner for branch in _branches(node) for inner in branch.node):
                inner.input[:] = [wide.get(name, name) for name in inner.input]
            node.input[:] = [wide.get(name, name) for name in node.input]
            _retype(node)
            body.node.append(node)
    for output in body.output:
        if output.name in wide:
            raise MalformedError("an output of the graph is a weight", tensor=output.name)
    del body.value_info[:]
    return twin


def _branches(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def _widen_branches(body: onnx.GraphProto) -> None:
    """Make the branches of a graph float32 but for what they read from outside."""
    for branch in (branch for node in body.node for branch in _branches(node)):
        for value in branch.output:
            if value.type.tensor_type.elem_type in SHORT_TYPES:
                value.type.tensor_type.elem_type = _FLOAT
        for tensor in branch.initializer:
            _widen(tensor)
        for node in branch.node:
            _retype(node)


def _retype(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i in SHORT_TYPES:
            attribute.i = _FLOAT
        if attribute.HasField("t"):
            _widen(attribute.t)


def _widen(tensor: onnx.TensorProto) -> None:
    """Convert a small tensor to float32, in place."""
    if tensor.data_type in SHORT_TYPES:
        if tensor.external_data:
            raise MalformedError("a constant lies outside the graph", tensor=tensor.name)
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _unfuse_norms(node: onnx.NodeProto, head_dim: int) -> list[onnx.NodeProto]:
    """Return the node, with norms of queries and keys moved in front of it."""
    if node.op_type != "GroupQueryAttention" or len(node.input) <= _K_NORM or not node.input[_Q_NORM]:
        return [node]
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if not {"num_heads", "kv_num_heads", "qk_norm_epsilon"} <= set(attributes):
        raise MalformedError("attention with inner norms lacks heads or epsilon", tensor=node.name)
    attention = onnx.NodeProto()
    attention.CopyFrom(node)
    at, added = f"{node.name}/twin", []
    if not node.input[1]:
        sizes = [attributes["num_heads"] * head_dim, *[attributes["kv_num_heads"] * head_dim] * 2]
        added.append(_constant(f"{at}/sizes", sizes))
        parts = [f"{at}/q", f"{at}/k", f"{at}/v"]
        added.append(onnx.helper.make_node("Split", [node.input[0], f"{at}/sizes"], parts, axis=-1))
        attention.input[:3] = parts
    for index, gain in ((0, node.input[_Q_NORM]), (1, node.input[_K_NORM])):
        heads, flat, normed = (f"{at}/{index}/{step}" for step in ("heads", "flat", "normed"))
        shape, back = f"{heads}/shape", f"{flat}/shape"
        added += [
            _constant(shape, [0, 0, -1, head_dim]),
            _constant(back, [0, 0, attributes["num_heads" if index == 0 else "kv_num_heads"] * head_dim]),
            onnx.helper.make_node("Reshape", [attention.input[index], shape], [heads]),
            onnx.helper.make_node(
                "SimplifiedLayerNormalization", [heads, gain], [normed], axis=-1, epsilon=attributes["qk_norm_epsilon"]
            ),
            onnx.helper.make_node("Reshape", [normed, back], [flat]),
        ]
        attention.input[index] = flat
    attention.input[:] = list(attention.input)[:_Q_NORM]
    while attention.input and not attention.input[-1]:
        del attention.input[-1]
    remaining = [attribute for attribute in attention.attribute if attribute.name != "qk_norm_epsilon"]
    del attention.attribute[:]
    attention.attribute.extend(remaining)
    return [*added, attention]


def _constant(name: str, values: list[int]) -> onnx.NodeProto:
    return onnx.helper.make_node(
        "Constant", [], [name], value=onnx.numpy_helper.from_array(np.array(values, np.int64), name)
    )
