# SPDX-License-Identifier: Apache-2.0
"""Weights inside of a graph: what no file beside it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from surgery_formats.errors import FitError
from surgery_formats.files.raw import File
from surgery_formats.text import nbytes as human

if TYPE_CHECKING:
    import onnx

__all__ = ["embed"]

_INT64 = 7  # of TensorProto.DataType
_PROTOBUF_LIMIT = 2_000_000_000  # bytes per message; readers refuse 2 GiB


def embed(model: onnx.ModelProto, files: Mapping[str, File]) -> None:
    """Move the bytes of a model's weights into it, from files by the names that the graph has for them.

    A range that two initializers read is held once: the
    other one becomes a Reshape, which runtimes fold.

    Raises:
        FitError: they exceed the limit of a protocol buffer.
    """
    total = 0
    held: dict[tuple[str, int, int, int], onnx.TensorProto] = {}
    twins: list[tuple[onnx.TensorProto, onnx.TensorProto]] = []
    for tensor in model.graph.initializer:
        if not tensor.external_data:
            continue
        entry = {field.key: field.value for field in tensor.external_data}
        place = entry["location"], int(entry["offset"]), int(entry["length"]), tensor.data_type
        if (first := held.setdefault(place, tensor)) is not tensor:
            twins.append((tensor, first))
            continue
        total += int(entry["length"])
        if total > _PROTOBUF_LIMIT:
            raise FitError(
                f"the weights exceed the {human(_PROTOBUF_LIMIT)} that one file can hold",
                hint='`weights="copy"` or link',
            )
        start, length, name = int(entry["offset"]), int(entry["length"]), entry["location"]
        tensor.raw_data = bytes(files[name].read(start, length))
        del tensor.external_data[:]
        tensor.ClearField("data_location")
    for tensor, first in twins:
        _reshape(model.graph, tensor, first)


def _reshape(graph: onnx.GraphProto, tensor: onnx.TensorProto, first: onnx.TensorProto) -> None:
    """Make an initializer a Reshape of another one of the same bytes."""
    sizes, name = list(tensor.dims), tensor.name
    graph.initializer.remove(tensor)
    shape = graph.initializer.add(name=f"{name}/shape", data_type=_INT64, dims=[len(sizes)])
    shape.int64_data.extend(sizes)
    node = graph.node.add(op_type="Reshape", name=f"{name}/Reshape", input=[first.name, shape.name], output=[name])
    nodes = [node, *list(graph.node)[:-1]]
    copies = [type(node).FromString(each.SerializeToString()) for each in nodes]
    del graph.node[:]
    graph.node.extend(copies)
