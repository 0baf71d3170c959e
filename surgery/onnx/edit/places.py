# SPDX-License-Identifier: Apache-2.0
"""Where the weights of a base lie in a graph that somebody else made: found by their values, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery_formats.containers.onnx import OnnxGraph
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Component
from surgery_formats.tensors.views import Index
from surgery_formats.text import show

__all__ = ["WeightPlace", "places_of"]

Array = npt.NDArray[Any]
_FLOATS = (DType.F32, DType.F16, DType.BF16, DType.F64)


@dataclass(frozen=True, slots=True)
class WeightPlace:
    """Outputs of a weight in a tensor of a graph: those at `at` are the weight's `rows`.

    Attributes:
        tensor: The tensor.
        weight: The weight.
        rows: Which of the weight's outputs lie there (of a table: which rows).
        at: Where, among the tensor's outputs.
        width: Number of the tensor's outputs.
        by_output: Whether the tensor's rows are the outputs.
    """

    tensor: str
    weight: str
    rows: Index
    at: Index
    width: int
    by_output: bool

    @property
    def is_all(self) -> bool:
        """Whether the tensor holds nothing else, in the weight's order."""
        return list(self.at) == list(range(self.width))


def places_of(graph: OnnxGraph, component: Component, weights: Iterable[str]) -> dict[str, tuple[WeightPlace, ...]]:
    """Where each weight lies, in the order of the graph.

    Raises:
        FitError: a weight, or a part of it, is not in the graph.
    """
    tensors = {name: tensor for name, tensor in graph.tensors.items() if tensor.dtype in _FLOATS and tensor.numel}
    found: dict[str, tuple[WeightPlace, ...]] = {}
    for name in weights:
        parameter = component.parameters[component.aliases.get(name, name)]
        weight = np.asarray(parameter.get())
        shape = parameter.sizes if len(parameter.sizes) > 2 else weight.shape
        places = [place for key, tensor in tensors.items() for place in _places(key, tensor, name, weight, shape)]
        if set().union(*(place.rows for place in places)) != set(range(len(weight))):
            raise FitError(
                f"the graph does not hold the weight '{show(name)}' of the base",
                file=graph.path,
                hint="the graph was made of another model, or its weights were changed since, or stored as codes",
            )
        found[name] = tuple(places)
    return found


def _places(key: str, tensor: Any, name: str, weight: Array, shape: tuple[int, ...]) -> Iterator[WeightPlace]:
    out, width = weight.shape
    sizes = tensor.shape
    if len(sizes) > 2:
        if (sizes == tuple(shape) or sizes[:2] == (out, width)) and np.prod(sizes) == weight.size:
            stored = np.asarray(tensor.read()).reshape(out, -1)
            if _same(stored, weight):
                yield WeightPlace(key, name, range(out), range(out), out, by_output=True)
        return
    if len(sizes) != 2 or width not in sizes:
        return
    stored = np.asarray(tensor.read())
    for by_output in (True, False):
        matrix = stored if by_output else stored.T
        if matrix.shape[1] != width:
            continue
        for rows, at in _matches(matrix, weight):
            yield WeightPlace(key, name, rows, range(at, at + len(rows)), len(matrix), by_output)
            return


def _matches(matrix: Array, weight: Array) -> Iterator[tuple[range, int]]:
    """Where rows of `weight` lie in `matrix`: all of them, or, if it is smaller, those that fill it."""
    cast = weight.astype(matrix.dtype)
    inner, outer = (cast, matrix) if len(weight) <= len(matrix) else (matrix, cast)
    firsts = np.flatnonzero((outer[:, :8] == inner[0, :8]).all(1))
    for at in map(int, firsts):
        if at + len(inner) <= len(outer) and _same(outer[at : at + len(inner)], inner):
            yield (range(len(weight)), at) if inner is cast else (range(at, at + len(inner)), 0)


def _same(stored: Array, weight: Array) -> bool:
    return stored.shape == weight.shape and bool((stored == weight.astype(stored.dtype)).all())
