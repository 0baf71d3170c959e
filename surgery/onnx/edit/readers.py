# SPDX-License-Identifier: Apache-2.0
"""Which nodes read each value of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from surgery.onnx.edit.uses import graphs_in

if TYPE_CHECKING:
    import onnx

__all__ = ["Readers", "readers_of"]

Readers = Mapping[str, Sequence[tuple["onnx.GraphProto", "onnx.NodeProto | None"]]]


def readers_of(main: onnx.GraphProto) -> Readers:
    """The nodes that read each value, with the graphs that they are in; of what a graph returns, the graph itself, without a node."""
    found: dict[str, list[tuple[onnx.GraphProto, onnx.NodeProto | None]]] = {}
    for inner in graphs_in(main):
        for node in inner.node:
            for value in set(node.input):
                found.setdefault(value, []).append((inner, node))
        for out in inner.output:
            found.setdefault(out.name, []).append((inner, None))
    return found
