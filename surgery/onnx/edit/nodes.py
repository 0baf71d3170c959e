# SPDX-License-Identifier: Apache-2.0
"""New nodes in a graph that exists: names that nobody has, and places in the order of the nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from surgery.onnx.edit.uses import graphs_in

if TYPE_CHECKING:
    import numpy as np
    import onnx

__all__ = ["Patch", "names_in"]


def names_in(graph: onnx.GraphProto) -> set[str]:
    """Names of all values and nodes of a graph and of the graphs inside it."""
    names: set[str] = set()
    for inner in graphs_in(graph):
        names |= {one.name for part in (inner.input, inner.output, inner.initializer, inner.value_info) for one in part}
        for node in inner.node:
            names |= {node.name, *node.output}
    return names


class Patch:
    """Nodes to come behind others, and constants; `apply` puts them into the graph."""

    def __init__(self, main: onnx.GraphProto) -> None:
        self._main = main
        self._taken = names_in(main)
        self._behind: list[tuple[onnx.GraphProto, str, list[onnx.NodeProto]]] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._new: list[onnx.NodeProto] = []

    def name(self, wanted: str) -> str:
        """`wanted`, or with a number behind it if it is taken; taken from now on."""
        name, number = wanted, 0
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name

    def is_free(self, name: str) -> bool:
        """Whether nothing has this name."""
        return name not in self._taken

    def node(self, op: str, inputs: Sequence[str], at: str, **attributes: Any) -> str:
        """A new node named after `at`; returns the name of its result."""
        import onnx

        name = self.name(f"{at}/{op}")
        self._new.append(onnx.helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def rename(self, value: str, name: str) -> None:
        """Give the result of a new node the name of one that was taken away."""
        for node in self._new:
            node.output[:] = [name if output == value else output for output in node.output]

    def constant(self, array: np.ndarray, at: str) -> str:
        """A constant; equal ones are stored once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.initializer(self.name(f"{at}/constant"), array)
        return self._constants[key]

    def initializer(self, name: str, array: np.ndarray) -> str:
        """A named initializer."""
        import onnx

        self._main.initializer.append(onnx.numpy_helper.from_array(array, name))
        return name

    def place(self, graph: onnx.GraphProto, behind: str) -> None:
        """Put the nodes made since the last call behind the node of `graph` that gives the value `behind`.

        At the beginning, if no node of `graph` does.
        """
        self._behind.append((graph, behind, self._new))
        self._new = []

    def apply(self) -> None:
        """Put all nodes into their graphs."""
        for graph in {id(graph): graph for graph, _, _ in self._behind}.values():
            position = {value: number + 1 for number, node in enumerate(graph.node) for value in node.output}
            ours = [(position.get(behind, 0), new) for owner, behind, new in self._behind if owner is graph]
            for at, new in sorted(ours, key=lambda pair: pair[0], reverse=True):
                for node in reversed(new):
                    graph.node.insert(at, node)
        self._behind = []
