# SPDX-License-Identifier: Apache-2.0
"""Which nodes two graphs have in common, and what differs in inputs and outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from surgery.comparison.graph_diff import NodeChange, PortChange
from surgery.onnx.edit.uses import graphs_in
from surgery.onnx.survey.modules import module_of
from surgery.reports.graph_report import PortReport, dims_text

if TYPE_CHECKING:
    import onnx

__all__ = ["changed_nodes", "changed_ports"]

_Place = tuple[str, str]  # module and operator


def changed_nodes(a: onnx.ModelProto, b: onnx.ModelProto) -> tuple[NodeChange, ...]:
    """Nodes that one has and the other lacks, and those of one name that differ, by operator and module.

    Nodes of one name are compared in full, but for names of values where no node has changed its place. The rest, of graphs
    that two programs made, is counted: as many of an operator in a module are alike.
    """
    mine, theirs = _by_key(a), _by_key(b)
    changed = Counter(
        _place(mine[key]) for key in mine.keys() & theirs.keys() if _content(mine[key]) != _content(theirs[key])
    )
    only_a = Counter(_place(node) for key, node in mine.items() if key not in theirs)
    only_b = Counter(_place(node) for key, node in theirs.items() if key not in mine)
    found = (("only in A", only_a - only_b), ("only in B", only_b - only_a), ("changed", changed))
    return tuple(
        NodeChange(change, module, operator, count)
        for change, counts in found
        for (module, operator), count in counts.items()
    )


def _by_key(model: onnx.ModelProto) -> dict[tuple[str, str, int], onnx.NodeProto]:
    """Nodes by name, or first output, and operator; those of functions by their function."""
    found: dict[tuple[str, str, int], onnx.NodeProto] = {}
    for scope, nodes in _all_nodes(model):
        for node in nodes:
            name = f"{scope}{node.name or (node.output[0] if node.output else '')}"
            number = 0
            while (key := (name, node.op_type, number)) in found:
                number += 1
            found[key] = node
    return found


def _all_nodes(model: onnx.ModelProto) -> Iterator[tuple[str, Iterable[onnx.NodeProto]]]:
    for graph in graphs_in(model.graph):
        yield "", graph.node
    for function in model.functions:
        yield f"{function.domain}.{function.name}/", function.node


def _place(node: onnx.NodeProto) -> _Place:
    return module_of(node), f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def _content(node: onnx.NodeProto) -> tuple[object, ...]:
    """What a node computes of what. Bodies of it are compared node by node."""
    attributes = sorted(
        (one.name, one.SerializeToString(deterministic=True))
        for one in node.attribute
        if not one.HasField("g") and not one.graphs
    )
    return node.domain, tuple(node.input), tuple(node.output), tuple(attributes)


def changed_ports(what: str, a: Iterable[PortReport], b: Iterable[PortReport]) -> tuple[PortChange, ...]:
    """Inputs or outputs of which type, dims or default differ, or that one graph lacks."""
    mine, theirs = {port.name: _text(port) for port in a}, {port.name: _text(port) for port in b}
    names: Mapping[str, None] = dict.fromkeys((*mine, *theirs))
    return tuple(
        PortChange(what, name, mine.get(name, ""), theirs.get(name, ""))
        for name in names
        if mine.get(name) != theirs.get(name)
    )


def _text(port: PortReport) -> str:
    return f"{port.dtype} {dims_text(port.dims)}{'' if port.default is None else ', optional'}"
