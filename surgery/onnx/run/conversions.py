# SPDX-License-Identifier: Apache-2.0
"""Weights that a graph stores in one type and computes with in another: onnxruntime converts them once, or each time they are used.

Once is quicker, and then all weights are held in the other type beside the mapped files: two bytes a parameter become six.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

__all__ = ["converted_nbytes", "with_late_conversions"]

_NBYTES = {1: 4, 10: 2, 11: 8, 16: 2}  # of elements of TensorProto's types


def converted_nbytes(model: onnx.ModelProto) -> int:
    """Bytes that the graph's stored weights take once they are converted."""
    stored = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer if tensor.external_data}
    return sum(stored[node.input[0]] * _NBYTES.get(node.attribute[0].i, 0) for node in _conversions(model))


def with_late_conversions(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which a weight is converted in front of the first node that reads it."""
    late = type(model)()
    late.CopyFrom(model)
    waiting = {node.output[0]: node for node in _conversions(model)}
    nodes = []
    for node in model.graph.node:
        if node.output and waiting.get(node.output[0]) is node:
            continue
        nodes += [waiting.pop(name) for name in dict.fromkeys(_read_by(node)) if name in waiting]
        nodes.append(node)
    del late.graph.node[:]
    late.graph.node.extend([*nodes, *waiting.values()])
    return late


def _conversions(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    stored = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    return (node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in stored)


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, its branches included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _read_by(inner)
