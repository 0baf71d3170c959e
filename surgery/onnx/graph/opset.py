# SPDX-License-Identifier: Apache-2.0
"""The least set of operators that a graph needs, and the least IR version that goes with it.

Runtimes refuse a graph by the two numbers it is stamped with, whatever its nodes are. onnxruntime 1.19 runs GPT-2's nodes,
but not under the numbers of a graph that needs Attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import onnx
import onnx.defs

from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError

__all__ = ["NEWEST", "OLDEST", "ir_version", "least_opset", "needs", "nodes_of"]

OLDEST = 17
"""The first set with LayerNormalization; every onnxruntime of the last four years has it."""

NEWEST = 23
"""The first set with Attention and RMSNormalization; nothing that is written needs more."""

_IR = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
_FLOAT8 = 19  # the first set with such numbers, of which this package writes weights alone
_TYPES = {DType.BF16: "tensor(bfloat16)", DType.F16: "tensor(float16)", DType.F32: "tensor(float)"}


def ir_version(opset: int) -> int:
    """The IR version of the first release of ONNX with this set of operators."""
    return _IR[opset]


def least_opset(graph: onnx.GraphProto, io: DType = DType.F32) -> int:
    """The least set in which every node of `graph` means what it does in the newest."""
    return max((needs(node, io) for node in nodes_of(graph)), default=OLDEST)


def needs(node: onnx.NodeProto, io: DType = DType.F32) -> int:
    """The least set that has the operator of `node` with its attributes and number of inputs, for type `io`.

    Raises:
        FitError: no set up to the newest has it.
    """
    if node.domain not in ("", "ai.onnx"):
        return OLDEST
    attributes = frozenset(attribute.name for attribute in node.attribute)
    least = _FLOAT8 if node.op_type == "DequantizeLinear" else OLDEST
    return max(least, _needs(node.op_type, attributes, len(node.input), len(node.output), _TYPES.get(io, "")))


@lru_cache(maxsize=4096)
def _needs(op: str, attributes: frozenset[str], inputs: int, outputs: int, io: str) -> int:
    known = False
    newest = _schema(op, NEWEST)
    for opset in range(OLDEST, NEWEST + 1):
        schema = _schema(op, opset)
        if schema is None:
            continue
        known = True
        if not attributes <= set(schema.attributes) or outputs > schema.max_output:
            continue
        if not schema.min_input <= inputs <= schema.max_input:
            continue
        if newest is not None and io in _types(newest) and io not in _types(schema):
            continue
        return opset
    if known:
        raise FitError(f"no set of operators up to {NEWEST} has this form of {op}")
    return OLDEST  # onnxruntime's own, such as SimplifiedLayerNormalization, lie in this domain too


def _schema(op: str, opset: int) -> onnx.defs.OpSchema | None:
    return onnx.defs.get_schema(op, opset, "") if onnx.defs.has(op) and _since(op) <= opset else None


@lru_cache(maxsize=512)
def _since(op: str) -> int:
    """The first set that has `op`."""
    for opset in range(1, NEWEST + 1):
        try:
            onnx.defs.get_schema(op, opset, "")
        except onnx.defs.SchemaError:
            continue
        return opset
    return NEWEST + 1


def _types(schema: onnx.defs.OpSchema) -> set[str]:
    return {kind for constraint in schema.type_constraints for kind in constraint.allowed_type_strs}


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes of a graph, those of its branches behind the node that has them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)
