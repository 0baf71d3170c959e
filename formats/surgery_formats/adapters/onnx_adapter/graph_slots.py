# SPDX-License-Identifier: Apache-2.0
"""The slots of a graph, as its inputs tell them: names, shapes, where the rank is, types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from surgery_formats.adapters.onnx_adapter.names import factor_name, factor_pairs, is_parameter
from surgery_formats.containers.onnx import open_graph
from surgery_formats.containers.onnx_adapter import ELEMENTS
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.bounded_json import parse_object

__all__ = ["FactorInput", "GraphSlot", "GraphSlots", "slots_in"]

_CONTRACT = "surgery.contract"  # under which graphs of this toolkit say which slots several weights share
_TYPES = {number: dtype for dtype, number in ELEMENTS.items()}


@dataclass(frozen=True, slots=True)
class FactorInput:
    """An input for one factor.

    Attributes:
        name: Its name.
        dims: Its sizes; None for a free one.
        dtype: Its type.
        default: Number of elements of its default: None if it has none, 0 for one of rank 0.
    """

    name: str
    dims: tuple[int | None, ...]
    dtype: DType
    default: int | None

    @property
    def needed(self) -> bool:
        """Whether an adapter that has nothing for it has to pass zeros."""
        return self.default != 0


@dataclass(frozen=True, slots=True)
class GraphSlot:
    """Both inputs of a slot.

    Attributes:
        module: The module, as the names call it.
        A: The first factor's.
        B: The second's.
        columns: The first column of B that is the module's, and the one behind its last, where several modules share the
            slot.
    """

    module: str
    A: FactorInput
    B: FactorInput
    columns: tuple[int, int] | None = None

    def rank_axis(self, inputs: int) -> int:
        """Where A has its rank: at the free size, or at the one that is not the number of inputs; else behind."""
        free = [axis for axis, size in enumerate(self.A.dims) if size is None]
        if len(self.A.dims) > 2 or free == [0]:
            return 0
        return 0 if not free and self.A.dims[0] != inputs and self.A.dims[1] == inputs else 1

    def fixed_rank(self, axis: int) -> int | None:
        """The rank that the graph asks for; None if any will do."""
        return self.A.dims[axis] or self.B.dims[1 - axis]


@dataclass(frozen=True, slots=True)
class GraphSlots:
    """The slots of a graph by module.

    Attributes:
        path: The graph.
        by_module: The slots, in the order of its inputs.
        dtype: Type of all of them.
        parameters: Inputs of that type that are parameters with a default, by name.
    """

    path: Path
    by_module: Mapping[str, GraphSlot]
    dtype: DType
    parameters: Mapping[str, FactorInput] = field(default_factory=dict)


def slots_in(path: Path) -> GraphSlots:
    """Read the slots of the graph `path`.

    Raises:
        InputError: it cannot be read.
        FitError: it has none, of several types, or as codes.
    """
    graph = open_graph(path)
    proto = graph.proto.graph
    defaults = {one.name: math.prod(one.dims) for one in proto.initializer}
    inputs: dict[str, FactorInput] = {}
    parameters: dict[str, FactorInput] = {}
    for one in proto.input:
        kind = one.type.tensor_type
        if factor_name(one.name) is None:
            if one.name in defaults and is_parameter(one.name) and kind.elem_type in _TYPES:
                dims = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim)
                parameters[one.name] = FactorInput(one.name, dims, _TYPES[kind.elem_type], defaults[one.name])
            continue
        if kind.elem_type not in _TYPES or not kind.HasField("shape"):
            raise FitError("the input has no shape, or a type that no factor has", file=path, tensor=one.name)
        dims = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim)
        inputs[one.name] = FactorInput(one.name, dims, _TYPES[kind.elem_type], defaults.get(one.name))
    pairs = dict(factor_pairs(inputs))
    packed = _packed({one.key: one.value for one in graph.proto.metadata_props}, inputs, pairs, path)
    by_module: dict[str, GraphSlot] = {}
    for A, B in pairs.items():
        found = factor_name(A)
        assert found is not None
        for module, columns in packed.get(A, {found.module: None}).items():
            if module in by_module:
                raise FitError("two slots are of one module", file=path, tensor=A)
            by_module[module] = GraphSlot(module, inputs[A], inputs[B], columns)
    if not by_module:
        inside = any(factor_name(one.name) is not None for one in proto.initializer)
        raise FitError(
            "the graph has LoRA factors inside, and no inputs for others" if inside else "the graph has no slots",
            file=path,
            hint="surgery fold takes them into the weights" if inside else "surgery insert gives it some",
        )
    types = {one.dtype for slot in by_module.values() for one in (slot.A, slot.B)}
    if len(types) > 1:
        raise FitError("its slots are of several types", file=path)
    dtype = types.pop()
    return GraphSlots(path, by_module, dtype, {name: one for name, one in parameters.items() if one.dtype is dtype})


def _packed(
    props: Mapping[str, str], inputs: Mapping[str, FactorInput], pairs: Mapping[str, str], path: Path
) -> dict[str, dict[str, tuple[int, int] | None]]:
    """The modules that share a slot, with their columns of B, by the name of A; `pairs` are the names of A and B.

    Raises:
        MalformedError: what the graph says of its slots is no such thing, or does not fit its inputs.
    """
    found: dict[str, dict[str, tuple[int, int] | None]] = {}
    unfit: list[str] = []
    if '"parts"' not in (text := props.get(_CONTRACT, "")):
        return found
    try:
        for slot in parse_object(text.encode("utf-8", "surrogatepass"), file=path)["slots"]:
            if not (parts := slot.get("parts")):
                continue
            A, first, modules = slot["A"], 0, found.setdefault(slot["A"], {})
            for name, width in parts:
                modules[str(name).removesuffix(".weight")] = (first, first + width)
                first += width
            whole = all(type(width) is int and width > 0 for _, width in parts) and len(modules) == len(parts)
            match inputs[A].dims, inputs[pairs[A]].dims:
                case (int(), None), (None, columns) if whole and columns == first and pairs[A] == slot["B"]:
                    pass
                case _:
                    unfit.append(pairs[A])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MalformedError("what the graph says of its slots cannot be read", file=path) from error
    if unfit:
        raise MalformedError("its parts are not the columns of its factor", file=path, tensor=unfit[0])
    return found
