# SPDX-License-Identifier: Apache-2.0
"""Initializers that are byte ranges of the checkpoint's own files, and the account of which tensors a graph has used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from surgery.onnx.graph.graph import ONNX_TYPES, Graph
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.files.raw import File
from surgery_formats.models.checkpoint import Component
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.tensors.unwritten import UnwrittenFile, UnwrittenTensor
from surgery_formats.text import closest, listing

__all__ = ["GraphTensor", "GraphWeights", "file_of"]

GraphTensor = StoredTensor | UnwrittenTensor
"""What an initializer may point at: a graph needs the place of the bytes, not the bytes."""


def file_of(tensor: GraphTensor) -> str:
    """Name of the file a tensor lies in, as the graph gives it: no folder."""
    return tensor.path.name


class GraphWeights:
    """The tensors of one checkpoint as values of one graph.

    Attributes:
        used: Stored names that some node reads.
        files: Files they lie in, in order of use.
    """

    def __init__(
        self, graph: Graph, component: Component, io: DType, overrides: Mapping[str, GraphTensor] | None = None
    ) -> None:
        """Read from `component`, but from `overrides` (by stored name) where it has the tensor."""
        self._graph = graph
        self._component = component
        self._io = io
        self._overrides = overrides or {}
        self._found: dict[str, GraphTensor] = {}
        self._values: dict[tuple[str, DType], str] = {}
        self.used: set[str] = set()
        self.files: list[File | UnwrittenFile] = []

    def find(self, name: str, shape: Sequence[int]) -> GraphTensor:
        """The tensor the recipe calls `name`.

        Raises:
            FitError: there is none, its shape is another, or its type is none that a graph computes with.
        """
        tensor = self._found.get(name)
        if tensor is None:
            tensor = self._found[name] = self._look_up(name)
        if tensor.shape != tuple(shape):
            raise FitError(
                f"has the shape {list(tensor.shape)}, config.json makes it {list(shape)}",
                file=tensor.path,
                tensor=tensor.name,
            )
        return tensor

    def rows(self, name: str) -> int:
        """Rows of a table whose number the recipe does not know.

        Raises:
            FitError: there is no such tensor, or it is a scalar.
        """
        tensor = self._found[name] = self._found.get(name) or self._look_up(name)
        if not tensor.shape:
            raise FitError("is a scalar", file=tensor.path, tensor=tensor.name)
        return tensor.shape[0]

    def _look_up(self, name: str) -> GraphTensor:
        stored = self._stored_name(name)
        self.used.add(stored)
        tensor = self._overrides.get(stored, self._component.tensors.get(stored))
        if tensor is None:  # a weight of several tensors
            weight = self._component.parameters[stored]
            raise _not_computed_with(weight.storage.kind, stored, weight.sources[0].path)
        if not tensor.dtype.is_float or tensor.dtype not in ONNX_TYPES:
            raise _not_computed_with(tensor.dtype.label, stored, tensor.path)
        if tensor.path.suffix != ".safetensors":
            raise FitError(
                "a graph refers to safetensors files only",
                file=tensor.path,
                tensor=stored,
                hint="save the checkpoint as safetensors first",
            )
        if tensor.file not in self.files:
            self.files.append(tensor.file)
        return tensor

    def _stored_name(self, name: str) -> str:
        if name in self._component.parameters or name in self._overrides:
            return name
        places = self._component.names.resolve(name)
        if len(places) != 1:
            raise FitError(
                "the checkpoint has no such tensor",
                file=self._component.folder,
                tensor=name,
                hint=closest(name, self._component.parameters) or "is it complete?",
            )
        return places[0].parameter.name

    def value(self, name: str, shape: Sequence[int]) -> str:
        """The tensor as a value of the graph's type."""
        return self.adjacent([name], [shape]) or ""

    def adjacent(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> str | None:
        """Tensors that lie one after the other as one value, joined along the first axis; None where they do not."""
        found = [self.find(name, shape) for name, shape in zip(names, shapes, strict=True)]
        first = found[0]
        at = first.offset
        for tensor, shape in zip(found, shapes, strict=True):
            if tensor.file is not first.file or tensor.offset != at or tensor.dtype is not first.dtype:
                return None
            if tuple(shape[1:]) != tuple(shapes[0][1:]):
                return None
            at += tensor.nbytes
        if len(found) == 1:
            return self._ranged(first.name, first, shapes[0], first.nbytes)
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return self._ranged(_joint_name([tensor.name for tensor in found]), first, shape, at - first.offset)

    def exact(self, name: str, shape: Sequence[int]) -> str:
        """The tensor as a value of float32, whatever the graph's type."""
        tensor = self.find(name, shape)
        return self._ranged(tensor.name, tensor, shape, tensor.nbytes, DType.F32)

    def _ranged(self, name: str, first: GraphTensor, shape: Sequence[int], nbytes: int, to: DType | None = None) -> str:
        """A range of bytes, through a Cast where it is stored in another type; runtimes fold that one when they load the graph."""
        wanted = to or self._io
        known = self._values.get((name, wanted))
        if known is None:
            stored = f"{name}.{first.dtype.label.lower()}" if first.dtype is not self._io else name
            self._graph.external(stored, first.dtype, first.offset, file_of(first), shape, nbytes)
            known = stored
            if first.dtype is not wanted:
                known = self._graph.node("Cast", [stored], name, to=ONNX_TYPES[wanted])
            self._values[name, wanted] = known
        return known

    def leftovers(self, excused: Mapping[str, str]) -> list[str]:
        """Stored tensors that no node reads and that are neither computed, nor tied, nor `excused`."""
        component = self._component
        derivable = tuple(f".{leaf}" for leaf in component.family.derivable)
        tied = {source: alias for alias, source in component.aliases.items()}
        return [
            name
            for name in {**component.tensors, **self._overrides}
            if name not in self.used
            and name not in excused
            and component.aliases.get(name) not in self.used
            and tied.get(name) not in self.used
            and not f".{name}".endswith(derivable)
        ]

    def check(self, excused: Mapping[str, str]) -> None:
        """Refuse a graph that leaves a tensor out.

        Raises:
            FitError: naming those.
        """
        if left := self.leftovers(excused):
            raise FitError(
                f"{len(left)} tensors have no place in this architecture: {listing(left)}",
                file=self._component.folder,
                tensor=left[0],
                hint="config.json and weights are of different models, or the model has parts that are not known",
            )


def _not_computed_with(kind: str, name: str, file: Path) -> FitError:
    return FitError(
        f"is stored as {kind}, which graphs do not compute with",
        file=file,
        tensor=name,
        hint="dequantise the checkpoint first",
    )


def _joint_name(names: Sequence[str]) -> str:
    """``a.q_proj.weight``, ``a.k_proj.weight`` -> ``a.q_proj+k_proj.weight``."""
    split = [name.split(".") for name in names]
    differing = [i for i, parts in enumerate(zip(*split, strict=False)) if len(set(parts)) > 1]
    if len({len(parts) for parts in split}) != 1 or len(differing) != 1:
        return "+".join(names)
    joint = list(split[0])
    joint[differing[0]] = "+".join(parts[differing[0]] for parts in split)
    return ".".join(joint)
