# SPDX-License-Identifier: Apache-2.0
"""What the nodes of a graph do with a weight: the products, convolutions and look-ups that read it.

A weight may pass through nodes that keep its elements (Cast, Transpose, DequantizeLinear) on its way, and it may be read
inside the branches of an If or the body of a Loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from surgery.onnx.edit.integers import numbers_of_product, numbers_of_table
from surgery_formats.errors import FitError
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

__all__ = ["Kind", "Use", "attribute", "graphs_in", "turns_inputs", "uses_of"]

Kind = Literal["product", "convolution", "table"]
"""What a node does with a weight: multiplies by it, convolves with it, or takes rows of it."""
_KEEPING = ("Identity", "Cast", "DequantizeLinear")
_OF_SHAPE = ("Shape", "Size")
_INTEGERS = (2, 3, 21, 22)  # TensorProto.UINT8, INT8, UINT4, INT4


@dataclass(frozen=True, eq=False)
class Use:
    """A node that multiplies by a weight, convolves with it, or takes rows of it.

    Attributes:
        graph: The graph that the node is in: the main one, or the body of a node.
        node: The node whose result that is; with integers the one that makes numbers of them.
        kind: What it does.
        x: Its other operand: the inputs, or the ids of rows.
        y: Its result.
        by_output: Whether the rows of the weight, as it lies, are the outputs of the map.
        alpha: What it multiplies the product by.
        element: ``TensorProto.DataType`` of its numbers.
    """

    graph: onnx.GraphProto
    node: onnx.NodeProto
    kind: Kind
    x: str
    y: str
    by_output: bool
    alpha: float = 1.0
    element: int = 0


def graphs_in(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and those inside its nodes."""
    yield graph
    for node in graph.node:
        for one in node.attribute:
            for inner in (*([one.g] if one.HasField("g") else []), *one.graphs):
                yield from graphs_in(inner)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of an attribute, or `default`."""
    import onnx

    found = next((one for one in node.attribute if one.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def uses_of(graph: onnx.GraphProto, name: str) -> list[Use]:
    """All uses of the tensor `name` of the main graph.

    Raises:
        FitError: a node makes something of it that is not understood.
    """
    types = {one.name: one.data_type for one in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and (value := attribute(node, "value", None)) is not None:
            types[node.output[0]] = value.data_type
    return [
        use
        for inner in graphs_in(graph)
        if inner is graph or all(name != own.name for own in (*inner.input, *inner.initializer))
        for use in _in_graph(inner, name, types, turned=False, element=types.get(name, 0))
    ]


def _in_graph(
    graph: onnx.GraphProto, name: str, types: Mapping[str, int], *, turned: bool, element: int
) -> Iterator[Use]:
    """The uses of a value in one graph; those of what a node makes of it are in the same graph or in graphs inside."""
    for node in graph.node:
        for position, value in enumerate(node.input):
            if value != name:
                continue
            op = node.op_type
            if op in _OF_SHAPE:
                continue
            if op in _KEEPING and position == 0:
                following = attribute(node, "to", 0) if op == "Cast" else element
                if op == "DequantizeLinear":
                    following = attribute(node, "output_dtype", 0) or types.get(node.input[1], 0)
                yield from _below(graph, node.output[0], types, turned=turned, element=following)
            elif op == "Transpose" and list(attribute(node, "perm", [1, 0])) == [1, 0]:
                yield from _below(graph, node.output[0], types, turned=not turned, element=element)
            elif (use := _direct(graph, node, position, types, turned, element)) is not None:
                yield use
            else:
                raise FitError(
                    f"'{show(name)}' is read by the {show(op, 40)} '{show(node.name or node.output[0])}', beside which "
                    "there is no place for a slot",
                    hint="merge the adapter into the graph instead",
                )


def _below(graph: onnx.GraphProto, name: str, types: Mapping[str, int], *, turned: bool, element: int) -> Iterator[Use]:
    for inner in graphs_in(graph):
        yield from _in_graph(inner, name, types, turned=turned, element=element)


def _direct(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    position: int,
    types: Mapping[str, int],
    turned: bool,
    element: int,
) -> Use | None:
    """The use of the operand at `position`; None if this node is not understood."""
    op = node.op_type
    by_output, alpha, x, end = True, 1.0, node.input[0], node
    kind: Kind = "product"
    if op == "MatMul" and position == 1:
        by_output = False
    elif op in ("Gemm", "FusedMatMul") and position == 1 and not turns_inputs(node):
        by_output, alpha = bool(attribute(node, "transB", 0)), float(attribute(node, "alpha", 1.0))
    elif op == "Conv" and position == 1 and attribute(node, "group", 1) == 1:
        kind = "convolution"
    elif position == 0 and (op == "GatherBlockQuantized" or (op == "Gather" and attribute(node, "axis", 0) == 0)):
        kind, x = "table", node.input[1]
        element = types.get(node.input[2], 0) if op == "GatherBlockQuantized" else element
    elif op == "MatMulNBits" and position == 1:
        element = types.get(node.input[2], 0)
    elif op == "MatMulInteger" and position == 1 and (numbers := numbers_of_product(graph, node)) is not None:
        by_output, x, end, element = False, numbers.x, numbers.node, types.get(numbers.scale, 0)
    else:
        return None
    if op == "Gather" and element in _INTEGERS:
        rows = numbers_of_table(graph, node)
        if rows is None:
            return None
        end, element = rows.node, types.get(rows.scale, 0)
    return Use(graph, end, kind, x, end.output[0], by_output != turned, alpha, element)


def turns_inputs(node: onnx.NodeProto) -> bool:
    """Whether a product transposes its inputs, or exchanges axes of its batch."""
    return any(attribute(node, name, 0) for name in ("transA", "transBatchA", "transBatchB"))
