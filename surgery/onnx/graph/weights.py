# SPDX-License-Identifier: Apache-2.0
"""Initializers that are byte ranges of the checkpoint's files, and a record of the tensors a graph uses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from surgery.onnx.graph.coded import GraphCodes, together
from surgery.onnx.graph.graph import ONNX_TYPES, Graph
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.files.raw import File
from surgery_formats.models.component import Component
from surgery_formats.models.families.tasks import TRAINED_HEADS
from surgery_formats.storage.turned_elements import ACROSS
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.tensors.unwritten import UnwrittenFile, UnwrittenTensor
from surgery_formats.text import closest, listing

__all__ = ["ACROSS", "LABELS", "GraphTensor", "GraphWeights", "Replaceable", "file_of", "joint_name"]

LABELS = "labels"
"""Name of the free axis of a classifier that adapters replace."""

GraphTensor = StoredTensor | UnwrittenTensor
"""Possible targets of an initializer: a graph needs the location of the bytes, not the bytes."""


def file_of(tensor: GraphTensor) -> str:
    """Name of a tensor's file as the graph refers to it, without a folder."""
    return tensor.path.name


@dataclass(frozen=True)
class Replaceable:
    """Parameters that become optional inputs, the base's values being the default.

    Attributes:
        names: Their names in the recipe.
        sizes: Sizes of inputs with free axes, which have names: the labels of a classifier, the rank of an inserted module.
        absent: Those that the base lacks; their default is zero.
    """

    names: frozenset[str] = frozenset()
    sizes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()

    def __or__(self, other: Replaceable) -> Replaceable:
        return Replaceable(self.names | other.names, {**self.sizes, **other.sizes}, self.absent | other.absent)


class GraphWeights:
    """The tensors of one checkpoint as values of one graph.

    Attributes:
        used: Stored names that some node reads.
        used_codes: Those of them that are codes.
        files: Files that hold them, in order of use.
        inputs: Types of the optional inputs by name, which is the recipe's of their parameter, in order of use.
    """

    def __init__(
        self,
        graph: Graph,
        component: Component,
        io: DType,
        overrides: Mapping[str, GraphTensor] | None = None,
        replaceable: Replaceable | None = None,
        coded: Mapping[str, GraphCodes] | None = None,
    ) -> None:
        """Use tensors of `component`, unless `overrides` or `coded` (by stored name) replaces them."""
        self._graph = graph
        self._component = component
        self._io = io
        self._overrides = overrides or {}
        self._coded = coded or {}
        self.replaceable = replaceable or Replaceable()
        self._tensors: dict[str, GraphTensor] = {}
        self._values: dict[tuple[str, DType], str] = {}
        self.used: set[str] = set()
        self.used_codes: dict[str, GraphCodes] = {}
        self.files: list[File | UnwrittenFile] = []
        self.inputs: dict[str, DType] = {}

    def find(self, name: str, shape: Sequence[int]) -> GraphTensor:
        """Look up the recipe's tensor `name`.

        Raises:
            FitError: it is missing, has another shape, or has a type that graphs do not support.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            tensor = self._tensors[name] = self._look_up(name)
        if tensor.shape != tuple(shape):
            raise FitError(
                f"has the shape {list(tensor.shape)}, but config.json implies {list(shape)}",
                file=tensor.path,
                tensor=tensor.name,
            )
        return tensor

    def rows(self, name: str) -> int:
        """Number of rows of a table whose size the recipe leaves open.

        Raises:
            FitError: there is no such tensor, or it is a scalar.
        """
        tensor = self._tensors[name] = self._tensors.get(name) or self._look_up(name)
        if not tensor.shape:
            raise FitError("is a scalar", file=tensor.path, tensor=tensor.name)
        return tensor.shape[0]

    def _look_up(self, name: str) -> GraphTensor:
        stored = self._stored_name(name)
        self.used.add(stored)
        tensor = self._overrides.get(stored)
        if tensor is None:
            storage = self._component.parameters[stored].storage
            if not isinstance(storage.elements, StoredTensor):
                raise _unsupported_type(storage.kind, stored, storage.sources[0].path)
            tensor = storage.elements
        if not tensor.dtype.is_float or tensor.dtype not in ONNX_TYPES:
            raise _unsupported_type(tensor.dtype.label, stored, tensor.path)
        if tensor.path.suffix != ".safetensors":
            raise FitError(
                "a graph can refer only to safetensors files",
                file=tensor.path,
                tensor=stored,
                hint="save the checkpoint as safetensors first",
            )
        if tensor.file not in self.files:
            self.files.append(tensor.file)
        return tensor

    def _stored_name(self, name: str) -> str:
        given = name in self._overrides or f"{name}{ACROSS}" in self._overrides or name in self._coded
        if given or name in self._component.parameters:
            return name
        slices = self._component.names.resolve(name)
        if len(slices) != 1:
            self._component.check_read()
            raise FitError(
                "the checkpoint has no such tensor",
                file=self._component.folder,
                tensor=name,
                hint="the model has no such head: another `task=`, or an adapter that brings it"
                if name.partition(".")[0] in TRAINED_HEADS
                else closest(name, self._component.parameters) or "is it complete?",
            )
        return slices[0].parameter.name

    @property
    def has_codes(self) -> bool:
        """Whether any weight is stored as codes."""
        return bool(self._coded)

    def coded(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> GraphCodes | None:
        """One or several weights of the same inputs as codes; None if they are not stored so, or not side by side.

        Shapes are ``(out, in)``, however the checkpoint has them.

        Raises:
            FitError: one is missing, or has another shape.
        """
        if not self._coded or not self.replaceable.names.isdisjoint(names):
            return None
        found = [self._coded.get(self._stored_name(name)) for name in names]
        tensors = [tensor for tensor in found if tensor is not None]
        if len(tensors) < len(names):
            return None
        for tensor, shape in zip(tensors, shapes, strict=True):
            if tensor.shape != tuple(shape):
                raise FitError(
                    f"has the shape {list(tensor.shape)}, but config.json implies {list(shape)}",
                    file=self._component.folder,
                    tensor=tensor.name,
                )
        joint = tensors[0]
        if len(tensors) > 1:
            side_by_side = together(tensors, joint_name([tensor.name for tensor in tensors]))
            if side_by_side is None:
                return None
            joint = side_by_side
        self.used |= {tensor.name for tensor in tensors}
        self.used_codes |= {tensor.name: tensor for tensor in tensors}
        for part in joint.parts:
            if part.file not in self.files:
                self.files.append(part.file)
        return joint

    def table(self, name: str, shape: Sequence[int]) -> GraphCodes | None:
        """A table whose rows are looked up by their codes, or None."""
        coded = self.coded([name], [shape])
        return coded if coded is not None and coded.rows else None

    def is_coded(self, name: str) -> bool:
        """Whether a weight is stored as codes."""
        return bool(self._coded) and self._stored_name(name) in self._coded

    def stored_type(self, name: str, shape: Sequence[int]) -> DType:
        """Type of the values in the checkpoint."""
        coded = self.table(name, shape)
        return self.find(name, shape).dtype if coded is None else coded.dtype

    def as_stored(self, name: str, shape: Sequence[int]) -> tuple[str, DType]:
        """The tensor without a conversion, and its type."""
        tensor = self.find(name, shape)
        stored = f"{tensor.name}.{tensor.dtype.label.lower()}" if tensor.dtype is not self._io else tensor.name
        self._graph.external(stored, tensor.dtype, tensor.offset, file_of(tensor), shape, tensor.nbytes)
        return stored, tensor.dtype

    def across(self, name: str, shape: Sequence[int]) -> str | None:
        """A matrix that was written with its axes exchanged; None if it was not, or is an input."""
        stored = self._stored_name(name)
        if name in self.replaceable.names or f"{stored}{ACROSS}" not in self._overrides:
            return None
        self.used.add(stored)
        return self.value(f"{stored}{ACROSS}", shape)

    def value(self, name: str, shape: Sequence[int]) -> str:
        """The tensor as a value of the graph's type."""
        if name in self.replaceable.names:
            return self._input(name, shape, self._io)
        return self.adjacent([name], [shape]) or ""

    def part(self, name: str, shape: Sequence[int], stack: tuple[int, int] | None) -> str:
        """The tensor, or number ``stack[0]`` of the ``stack[1]`` of this shape that it holds, as a value of the graph's type.

        Raises:
            FitError: see `find`; a replaceable stack.
        """
        if stack is None:
            return self.value(name, shape)
        number, count = stack
        tensor = self.find(name, (count, *shape))
        if name in self.replaceable.names:
            raise FitError(
                "values of stacked experts cannot be replaced", tensor=name, hint="merge the adapter instead"
            )
        each = tensor.nbytes // count
        return self._ranged(f"{tensor.name}.{number}", tensor, shape, each, first_byte=number * each)

    def adjacent(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> str | None:
        """Adjacent tensors as one value, joined along the first axis; None if they are not adjacent, or replaceable."""
        if not self.replaceable.names.isdisjoint(names):
            return None
        tensors = [self.find(name, shape) for name, shape in zip(names, shapes, strict=True)]
        first = tensors[0]
        end = first.offset
        for tensor, shape in zip(tensors, shapes, strict=True):
            if tensor.file is not first.file or tensor.offset != end or tensor.dtype is not first.dtype:
                return None
            if tuple(shape[1:]) != tuple(shapes[0][1:]):
                return None
            end += tensor.nbytes
        if len(tensors) == 1:
            return self._ranged(first.name, first, shapes[0], first.nbytes)
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return self._ranged(joint_name([tensor.name for tensor in tensors]), first, shape, end - first.offset)

    def exact(self, name: str, shape: Sequence[int]) -> str:
        """The tensor as a float32 value, whatever the graph's type."""
        if name in self.replaceable.names:
            return self._input(name, shape, DType.F32)
        tensor = self.find(name, shape)
        return self._ranged(tensor.name, tensor, shape, tensor.nbytes, DType.F32)

    def _input(self, name: str, shape: Sequence[int], dtype: DType) -> str:
        """The tensor as an optional input of type `dtype`.

        The default has the input's type, so it is stored in the graph unless the file's bytes can be it. In a graph of
        16 bits it is stored too, so that the graph can be verified in float32.

        Raises:
            FitError: a merge changes the tensor too, and would have to be written before its values can be converted.
        """
        if name in self.inputs:
            return name
        tensor = None if name in self.replaceable.absent else self.find(name, shape)
        if tensor is not None and dtype is DType.F32 and tensor.dtype is DType.F32:
            self._graph.external(name, tensor.dtype, tensor.offset, file_of(tensor), shape, tensor.nbytes)
        else:
            default = np.zeros(tuple(shape), np.float32) if tensor is None else _values(tensor)
            self._graph.initializer(name, default.astype(self._graph.numpy_type(dtype)))
        self.inputs[name] = dtype
        return self._graph.input(name, dtype, self.replaceable.sizes.get(name, tuple(shape)))

    def _ranged(
        self,
        name: str,
        first: GraphTensor,
        shape: Sequence[int],
        nbytes: int,
        to: DType | None = None,
        first_byte: int = 0,
    ) -> str:
        """A byte range as a value, with a Cast if stored in another type; runtimes fold the Cast at load time."""
        dtype = to or self._io
        value = self._values.get((name, dtype))
        if value is None:
            stored = f"{name}.{first.dtype.label.lower()}" if first.dtype is not self._io else name
            self._graph.external(stored, first.dtype, first.offset + first_byte, file_of(first), shape, nbytes)
            value = stored
            if first.dtype is not dtype:
                value = self._graph.node("Cast", [stored], name, to=ONNX_TYPES[dtype])
            self._values[name, dtype] = value
        return value

    def leftovers(self, excused: Mapping[str, str]) -> list[str]:
        """Stored tensors that no node reads and that are neither derivable, nor tied, nor `excused`."""
        component = self._component
        derivable = tuple(f".{leaf}" for leaf in component.family.derivable)
        tied = {source: alias for alias, source in component.aliases.items()}
        return [
            name
            for name in {**component.parameters, **self._overrides}
            if name not in self.used
            and name not in excused
            and component.aliases.get(name) not in self.used
            and tied.get(name) not in self.used
            and not f".{name}".endswith(derivable)
        ]

    def check(self, excused: Mapping[str, str]) -> None:
        """Refuse a graph that leaves out a tensor.

        Raises:
            FitError: tensors are left out.
        """
        if unused := self.leftovers(excused):
            raise FitError(
                f"{len(unused)} tensors have no place in this architecture: {listing(unused)}",
                file=self._component.folder,
                tensor=unused[0],
                hint="config.json and weights belong to different models, or the model has unsupported parts",
            )


def _values(tensor: GraphTensor) -> np.ndarray:
    if not isinstance(tensor, StoredTensor):
        raise FitError(
            "one adapter is merged into it and another replaces it, in a graph of another type",
            tensor=tensor.name,
            hint="export in the type of the merged weights",
        )
    return np.asarray(tensor.read()).astype(np.float32).reshape(tensor.shape)


def _unsupported_type(kind: str, name: str, file: Path) -> FitError:
    return FitError(
        f"is stored as {kind}, which graphs do not support",
        file=file,
        tensor=name,
        hint="dequantise the checkpoint first",
    )


def joint_name(names: Sequence[str]) -> str:
    """``a.q_proj.weight``, ``a.k_proj.weight`` -> ``a.q_proj+k_proj.weight``; of two places that differ all pairs."""
    split = [name.split(".") for name in names]
    differing = [i for i, parts in enumerate(zip(*split, strict=False)) if len(set(parts)) > 1]
    if len({len(parts) for parts in split}) != 1 or not 1 <= len(differing) <= 2:
        return "+".join(names)
    joint = list(split[0])
    if len(differing) == 1:
        joint[differing[0]] = "+".join(parts[differing[0]] for parts in split)
        return ".".join(joint)
    kinds = [list(dict.fromkeys(parts[place] for parts in split)) for place in differing]
    if list(itertools.product(*kinds)) != [tuple(parts[place] for place in differing) for parts in split]:
        return "+".join(names)
    for place, kind in zip(differing, kinds, strict=True):
        joint[place] = "+".join(kind)
    return ".".join(joint)
