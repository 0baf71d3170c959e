# SPDX-License-Identifier: Apache-2.0
"""What a weight of integers makes of numbers: the nodes that dynamic quantisation puts in the place of one product or look-up.

DynamicQuantizeLinear(x) -> MatMulInteger(weight) -> Cast -> Mul by both scales
Gather(weight, ids) -> DequantizeLinear
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

__all__ = ["IntegerEnd", "numbers_of_product", "numbers_of_table", "product_of"]

_SCALE = 1  # which result of DynamicQuantizeLinear, and which operand of DequantizeLinear


@dataclass(frozen=True, eq=False)
class IntegerEnd:
    """The end of such nodes.

    Attributes:
        x: The numbers that went in.
        node: The node that makes numbers of the result.
        scale: The scales of the weight.
    """

    x: str
    node: onnx.NodeProto
    scale: str


def product_of(
    end: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]
) -> tuple[onnx.NodeProto, IntegerEnd] | None:
    """The MatMulInteger whose result the node `end` makes numbers of, or None if it does not."""
    if end.op_type != "Mul" or len(end.input) != 2:
        return None
    for cast, scales in (tuple(end.input), tuple(end.input)[::-1]):
        product = _made_by(_input(producers.get(cast), "Cast"), "MatMulInteger", producers)
        both = producers.get(scales)
        if product is None or both is None or both.op_type != "Mul":
            continue
        coded = _made_by(product.input[0], "DynamicQuantizeLinear", producers)
        if coded is None or coded.output[_SCALE] not in both.input:
            continue
        own = [one for one in both.input if one != coded.output[_SCALE]]
        if len(own) == 1:
            return product, IntegerEnd(coded.input[0], end, own[0])
    return None


def numbers_of_product(graph: onnx.GraphProto, product: onnx.NodeProto) -> IntegerEnd | None:
    """The numbers that are made of a MatMulInteger, if nothing else reads its result."""
    cast = _only_reader(graph.node, product.output[0], "Cast")
    end = None if cast is None else _only_reader(graph.node, cast.output[0], "Mul")
    if end is None:
        return None
    found = product_of(end, {value: node for node in graph.node for value in node.output if value})
    return None if found is None else found[1]


def numbers_of_table(graph: onnx.GraphProto, gather: onnx.NodeProto) -> IntegerEnd | None:
    """The numbers that are made of rows of a table of integers, if nothing else reads these."""
    end = _only_reader(graph.node, gather.output[0], "DequantizeLinear")
    if end is None or end.input[0] != gather.output[0]:
        return None
    return IntegerEnd(gather.input[1], end, end.input[_SCALE])


def _input(node: onnx.NodeProto | None, op: str) -> str:
    return node.input[0] if node is not None and node.op_type == op else ""


def _made_by(value: str, op: str, producers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    node = producers.get(value)
    return node if node is not None and node.op_type == op else None


def _only_reader(nodes: Iterable[onnx.NodeProto], value: str, op: str) -> onnx.NodeProto | None:
    readers = [node for node in nodes if value in node.input]
    return readers[0] if len(readers) == 1 and readers[0].op_type == op else None
