# SPDX-License-Identifier: Apache-2.0
"""Two graphs as the branches of one, over the same initializers: what optimum calls a merged decoder.

The branch without a past comes first. What only one of them gives out is empty in the other, and callers keep theirs.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx

from surgery.onnx.graph.graph import Graph
from surgery.onnx.graph.pair_names import SWITCH
from surgery_formats.dtypes import DType

__all__ = ["as_branches"]


def as_branches(first: Graph, begun: Graph) -> Graph:
    """One graph with the inputs of both, and the outputs of `first`."""
    merged, bodies = Graph(), (first.proto, begun.proto)
    ports = {port.name: port for body in bodies for port in body.input}
    defaults = {tensor.name for body in bodies for tensor in body.initializer} & ports.keys()
    plain = [name for name in ports if name not in defaults and not _is_factor(name)]
    for name in plain:
        port = merged.proto.input.add()
        port.CopyFrom(ports[name])
        if name.startswith("past_key_values."):  # optimum 0.1 begins with empty ones of a size that it guesses
            dims = port.type.tensor_type.shape.dim
            dims[1].dim_param, dims[3].dim_param = "heads", "head_size"
    merged.input(SWITCH, DType.BOOL, (1,))
    for name in ports:
        if name not in plain:
            merged.proto.input.append(ports[name])
    shared = _shared_tensors(merged, bodies, ports.keys())
    casts: dict[tuple[str, int], str] = {}
    branches = [
        _branch(merged, body, name, shared, casts) for body, name in zip(bodies, ("first", "begun"), strict=True)
    ]
    _complete(branches[1], first.proto, begun.proto)
    outputs = [port.name for port in first.proto.output]
    node = merged.proto.node.add(op_type="If", name="branches", input=[SWITCH], output=outputs)
    for key, branch in (("then_branch", branches[1]), ("else_branch", branches[0])):
        node.attribute.add(name=key, type=onnx.AttributeProto.GRAPH).g.CopyFrom(branch)
    grown = {port.name: port for port in begun.proto.output}
    merged.proto.output.extend(grown.get(port.name, port) for port in first.proto.output)
    return merged


def _is_factor(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def _shared_tensors(merged: Graph, bodies: tuple[onnx.GraphProto, onnx.GraphProto], ports: Collection[str]) -> set[str]:
    """Move what both read to the outer graph: byte ranges of weight files, and defaults of inputs."""
    names: set[str] = set()
    for body in bodies:
        for tensor in body.initializer:
            if (tensor.external_data or tensor.name in ports) and tensor.name not in names:
                names.add(tensor.name)
                merged.proto.initializer.append(tensor)
    return names


def _branch(
    merged: Graph, body: onnx.GraphProto, name: str, shared: set[str], casts: dict[tuple[str, int], str]
) -> onnx.GraphProto:
    """A graph without inputs, its values under names of its own; conversions of weights happen once, outside."""
    branch = onnx.GraphProto(name=name)
    renamed: dict[str, str] = {}
    for node in body.node:
        if node.op_type == "Cast" and node.input[0] in shared:
            key = (node.input[0], node.attribute[0].i)
            if key not in casts:
                casts[key] = node.output[0]
                merged.proto.node.append(node)
            renamed[node.output[0]] = casts[key]
            continue
        copy = branch.node.add()
        copy.CopyFrom(node)
        copy.name = f"{name}/{node.name}"
        copy.input[:] = [renamed.get(value, value) for value in node.input]
        for position, value in enumerate(node.output):
            if value:
                renamed[value] = f"{name}/{value}"
                copy.output[position] = renamed[value]
    for tensor in body.initializer:
        if tensor.name not in shared:
            own = branch.initializer.add()
            own.CopyFrom(tensor)
            own.name = f"{name}/{tensor.name}"
            renamed[tensor.name] = own.name
    for node in branch.node:
        node.input[:] = [renamed.get(value, value) for value in node.input]
    for port in body.output:
        copy_of_port = branch.output.add()
        copy_of_port.CopyFrom(port)
        copy_of_port.name = renamed[port.name]
    return branch


def _complete(branch: onnx.GraphProto, first: onnx.GraphProto, begun: onnx.GraphProto) -> None:
    """Give the branch with a past what it lacks, without tokens, in the order of the other's outputs."""
    there = {port.name: made for port, made in zip(begun.output, list(branch.output), strict=True)}
    ordered = []
    for port in first.output:
        if port.name in there:
            ordered.append(there[port.name])
            continue
        shape = [0 if size.dim_param else size.dim_value for size in port.type.tensor_type.shape.dim]
        name = f"{branch.name}/{port.name}"
        value = onnx.helper.make_tensor(f"{name}/none", port.type.tensor_type.elem_type, shape, [])
        branch.node.add(op_type="Constant", name=name, output=[name]).attribute.add(
            name="value", type=onnx.AttributeProto.TENSOR
        ).t.CopyFrom(value)
        empty = onnx.ValueInfoProto()
        empty.CopyFrom(port)
        empty.name = name
        ordered.append(empty)
    del branch.output[:]
    branch.output.extend(ordered)
