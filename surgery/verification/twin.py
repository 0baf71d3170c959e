# SPDX-License-Identifier: Apache-2.0
"""A graph of 16 bits as a graph of float32 over the same bytes, so that the CPU provider runs it and nothing is rounded on the way.

It is made from the file that is to be verified, not built anew: a fault in the file stays in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery_formats.errors import MalformedError

if TYPE_CHECKING:
    import onnx

__all__ = ["SHORT_TYPES", "float32_twin"]

_FLOAT = 1
SHORT_TYPES = (10, 16)
"""FLOAT16 and BFLOAT16."""
_Q_NORM, _K_NORM = 14, 15  # inputs of GroupQueryAttention that only CUDA has


def float32_twin(graph: onnx.ModelProto, head_dim: int) -> onnx.ModelProto:
    """`graph` with every 16-bit value in float32.

    Args:
        graph: Left as it is.
        head_dim: Of its attention, for norms that an operator of CUDA holds inside.

    Raises:
        MalformedError: an operator lacks a part it cannot be without.
    """
    import onnx

    twin = onnx.ModelProto()
    twin.CopyFrom(graph)
    body = twin.graph
    nodes = [_outside(node, head_dim) for node in body.node]
    wide = {tensor.name: f"{tensor.name}/float32" for tensor in body.initializer if tensor.data_type in SHORT_TYPES}
    defaults = {value.name for value in body.input} & set(wide)
    for value in (*body.input, *body.output):
        if value.type.tensor_type.elem_type in SHORT_TYPES:
            value.type.tensor_type.elem_type = _FLOAT
    for tensor in body.initializer:
        if tensor.name in defaults:  # a default of an input has the input's type
            _widen(tensor)
            del wide[tensor.name]
    casts = [onnx.helper.make_node("Cast", [name], [made], to=_FLOAT) for name, made in wide.items()]
    del body.node[:]
    body.node.extend(casts)
    for parts in nodes:
        for node in parts:
            node.input[:] = [wide.get(name, name) for name in node.input]
            _retype(node)
            body.node.append(node)
    for output in body.output:
        if output.name in wide:
            raise MalformedError("an output of the graph is a weight", tensor=output.name)
    del body.value_info[:]
    return twin


def _retype(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i in SHORT_TYPES:
            attribute.i = _FLOAT
        if attribute.HasField("t"):
            _widen(attribute.t)


def _widen(tensor: onnx.TensorProto) -> None:
    """The values of a small tensor in float32, in place."""
    import numpy as np
    import onnx

    if tensor.data_type in SHORT_TYPES:
        if tensor.external_data:
            raise MalformedError("a constant lies outside the graph", tensor=tensor.name)
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _outside(node: onnx.NodeProto, head_dim: int) -> list[onnx.NodeProto]:
    """The node; where it norms queries and keys inside, norms before it instead."""
    import onnx

    if node.op_type != "GroupQueryAttention" or len(node.input) <= _K_NORM or not node.input[_Q_NORM]:
        return [node]
    given = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    if not {"num_heads", "kv_num_heads", "qk_norm_epsilon"} <= set(given):
        raise MalformedError("attention with norms inside lacks heads or epsilon", tensor=node.name)
    bare = onnx.NodeProto()
    bare.CopyFrom(node)
    at, made = f"{node.name}/twin", []
    if not node.input[1]:
        sizes = [given["num_heads"] * head_dim, *[given["kv_num_heads"] * head_dim] * 2]
        made.append(_constant(f"{at}/sizes", sizes))
        parts = [f"{at}/q", f"{at}/k", f"{at}/v"]
        made.append(onnx.helper.make_node("Split", [node.input[0], f"{at}/sizes"], parts, axis=-1))
        bare.input[:3] = parts
    for index, gain in ((0, node.input[_Q_NORM]), (1, node.input[_K_NORM])):
        heads, flat, normed = (f"{at}/{index}/{step}" for step in ("heads", "flat", "normed"))
        shape, back = f"{heads}/shape", f"{flat}/shape"
        made += [
            _constant(shape, [0, 0, -1, head_dim]),
            _constant(back, [0, 0, given["num_heads" if index == 0 else "kv_num_heads"] * head_dim]),
            onnx.helper.make_node("Reshape", [bare.input[index], shape], [heads]),
            onnx.helper.make_node(
                "SimplifiedLayerNormalization", [heads, gain], [normed], axis=-1, epsilon=given["qk_norm_epsilon"]
            ),
            onnx.helper.make_node("Reshape", [normed, back], [flat]),
        ]
        bare.input[index] = flat
    bare.input[:] = list(bare.input)[:_Q_NORM]
    while bare.input and not bare.input[-1]:
        del bare.input[-1]
    kept = [one for one in bare.attribute if one.name != "qk_norm_epsilon"]
    del bare.attribute[:]
    bare.attribute.extend(kept)
    return [*made, bare]


def _constant(name: str, values: list[int]) -> onnx.NodeProto:
    import numpy as np
    import onnx

    return onnx.helper.make_node(
        "Constant", [], [name], value=onnx.numpy_helper.from_array(np.array(values, np.int64), name)
    )
