# SPDX-License-Identifier: Apache-2.0
"""Nodes in which onnxruntime's optimiser fused a map and its activation, parted again: a slot belongs between the two."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from surgery.onnx.edit.uses import attribute, graphs_in

if TYPE_CHECKING:
    import onnx

__all__ = ["unfuse"]

_PLAIN = {"FusedGemm": "Gemm", "FusedConv": "Conv"}
_ACTIVATIONS = {"Relu": (), "Tanh": (), "Sigmoid": (), "Softplus": (), "LeakyRelu": ("alpha",)}
_SUM = 4  # inputs of a FusedConv that adds another value, too


def unfuse(graph: onnx.GraphProto, tensors: Collection[str]) -> None:
    """Part the fused nodes that read one of `tensors`; those with other activations stay as they are."""
    import onnx

    for inner in graphs_in(graph):
        for number in range(len(inner.node) - 1, -1, -1):
            node = inner.node[number]
            kind = attribute(node, "activation", b"").decode()
            fused = node.op_type in _PLAIN and kind in _ACTIVATIONS and len(node.input) < _SUM
            if not fused or not set(tensors) & set(node.input):
                continue
            numbers = [*attribute(node, "activation_params", [])] or [attribute(node, "activation_alpha", 0.0)]
            settings = dict(zip(_ACTIVATIONS[kind], numbers, strict=False))
            before = f"{node.output[0]} before {kind}"
            inner.node.insert(number + 1, onnx.helper.make_node(kind, [before], list(node.output), **settings))
            node.output[0], node.op_type = before, _PLAIN[node.op_type]
            node.ClearField("domain")
            kept = [one for one in node.attribute if not one.name.startswith("activation")]
            del node.attribute[:]
            node.attribute.extend(kept)
