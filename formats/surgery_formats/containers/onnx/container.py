# SPDX-License-Identifier: Apache-2.0
"""ONNX as a container: the weights of a graph, by the names that they have in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgery_formats.containers.base import Shard, ShardSet
from surgery_formats.containers.onnx.graph import OnnxGraph, open_graph
from surgery_formats.containers.onnx.wire import BYTES, VARINT, WireReader
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError, SurgeryError
from surgery_formats.files.raw import open_file
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing

__all__ = ["ONNX", "weights_of"]

_NAME = "onnx"
_FIELDS = 1000  # of a model, until its graph
_LARGE = 1024  # elements of a weight whose values are written one by one


def weights_of(graph: OnnxGraph) -> dict[str, StoredTensor]:
    """The tensors of a graph that are weights, by name in the order of the graph.

    Those are all initializers, and of what nodes hold all arrays of numbers: shapes, axes and scalars are the computation's.

    Raises:
        MalformedError: weights are written one by one, and lie nowhere as they are in memory.
    """
    typed = [name for name in graph.small if graph.small.is_weight(name, _LARGE)]
    if typed:
        raise MalformedError(
            f"{len(typed)} weights are written value by value ({listing(typed)})",
            file=graph.path,
            hint="save the graph again: onnx.save writes raw data for what onnx.numpy_helper.from_array makes",
        )
    return {name: tensor for name, tensor in graph.tensors.items() if _is_weight(graph, name, tensor)}


def _is_weight(graph: OnnxGraph, name: str, tensor: StoredTensor) -> bool:
    if graph.holders[name] in ("initializer", "SparseTensor"):
        return True
    return tensor.nbytes > tensor.dtype.bits // 8 and (
        tensor.dtype.is_float_or_fp8 or tensor.dtype in (DType.I8, DType.U8)
    )


@dataclass(frozen=True, slots=True)
class _Onnx:
    name: str = _NAME
    title: str = "model.onnx: a graph with its weights, in it or in files beside it"
    written_as: str = "safetensors"
    suffixes: tuple[str, ...] = (".onnx",)

    def detect(self, path: Path) -> bool:
        """A message that begins with a version and has a graph."""
        try:
            file = open_file(path)
            fields = WireReader(file).fields(0, file.size)
            first = next(fields, None)
            if first is None or (first.number, first.wire) != (1, VARINT):
                return False
            return any(
                field.number == 7 and field.wire == BYTES for field, _ in zip(fields, range(_FIELDS), strict=False)
            )
        except (SurgeryError, OSError):
            return False

    def open(self, path: Path) -> dict[str, ShardSet]:
        """The weights: a shard for the graph's own file, and one for each file beside it that holds some."""
        graph = open_graph(path)
        weights = weights_of(graph)
        shards = []
        for file in graph.files:
            own = tuple(sorted((t for t in weights.values() if t.file is file), key=lambda tensor: tensor.offset))
            if own or file is graph.file:
                shards.append(Shard(file.path, self.name, file, own))
        return {"": ShardSet(path.parent, tuple(shards))}


ONNX = _Onnx()
