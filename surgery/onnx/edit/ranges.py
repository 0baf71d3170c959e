# SPDX-License-Identifier: Apache-2.0
"""Ranges of activations in a quantised graph: those of the model that it was calibrated with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.onnx.edit.uses import graphs_in

if TYPE_CHECKING:
    import onnx

__all__ = ["warning_of_ranges"]


def warning_of_ranges(model: onnx.ModelProto) -> tuple[str, ...]:
    """A warning of activations that are quantised to ranges written in the graph, if there are any."""
    stored = {one.name for one in model.graph.initializer}
    nodes = [node for inner in graphs_in(model.graph) for node in inner.node]
    count = sum(node.op_type == "QuantizeLinear" and node.input[0] not in stored for node in nodes)
    if not count:
        return ()
    places = "one place" if count == 1 else f"{count} places"
    return (
        f"activations are quantised in {places} to ranges that were measured without the adapter: what it moves out of them is cut off",
    )
