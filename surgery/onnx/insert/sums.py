# SPDX-License-Identifier: Apache-2.0
"""From the last map of a branch to the sum that the branch ends in, in a graph that somebody else made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.onnx.edit.readers import Readers
from surgery.onnx.edit.uses import Use
from surgery_formats.errors import FitError
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

__all__ = ["BranchSum", "sum_behind"]

_PASSING = ("Identity", "Cast", "Reshape", "Dropout", "Squeeze", "Unsqueeze")
_SUMS = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}
"""Operators that sum up two values and norm the sum, with the place of a bias that they add, too."""


@dataclass(frozen=True, eq=False)
class BranchSum:
    """Where a branch ends.

    Attributes:
        node: The node that sums up.
        position: Which of its inputs is the body's result.
        body: That result.
        other: What the branch began with.
        bias: A bias of the last map that the node adds by itself, or empty.
        element: ``TensorProto.DataType`` of the numbers.
    """

    node: onnx.NodeProto
    position: int
    body: str
    other: str
    bias: str
    element: int


def sum_behind(graph: onnx.GraphProto, use: Use, readers: Readers, weight: str) -> BranchSum:
    """Follow the result of a map to the sum.

    Raises:
        FitError: something else is made of it.
    """
    stored = {one.name: one for one in graph.initializer}
    makers = {value: node for node in graph.node for value in node.output}
    before = _before(use.x, makers)
    value = use.y
    for _ in range(len(graph.node)):
        found = [node for inner, node in readers.get(value, ()) if inner is graph]
        if len(found) != 1 or found[0] is None or len(readers[value]) != 1:
            break
        node = found[0]
        if node.op_type in _PASSING and node.input[0] == value:
            value = node.output[0]
            continue
        if node.op_type == "Add" and list(node.input).count(value) == 1:
            position = list(node.input).index(value)
            other = node.input[1 - position]
            maker = makers.get(other)
            if (other in stored and len(stored[other].dims) <= 1) or use.x in _inputs_before(other, makers):
                value = node.output[0]  # the map's bias, or a LoRA beside the map
                continue
            if maker is not None and maker.output[0] not in before:
                break
            return BranchSum(node, position, value, other, "", use.element)
        if (place := _SUMS.get(node.op_type)) is not None and value in node.input[:2]:
            position = list(node.input[:2]).index(value)
            bias = node.input[place] if len(node.input) > place else ""
            return BranchSum(node, position, value, node.input[1 - position], bias, use.element)
        break
    raise FitError(
        f"the result of '{show(weight)}' is followed to '{show(value, 80)}', behind which there is no sum with the branch's input",
        hint="`surgery export-onnx BASE ADAPTER` makes a graph with the module",
    )


def _before(value: str, makers: Mapping[str, onnx.NodeProto]) -> set[str]:
    """The first outputs of all nodes that a value is made by."""
    found: set[str] = set()
    waiting = [value]
    while waiting:
        node = makers.get(waiting.pop())
        if node is not None and node.output[0] not in found:
            found.add(node.output[0])
            waiting += node.input
    return found


def _inputs_before(value: str, makers: Mapping[str, onnx.NodeProto]) -> set[str]:
    """All values that a value is made of."""
    return {one for name in _before(value, makers) for one in makers[name].input}
