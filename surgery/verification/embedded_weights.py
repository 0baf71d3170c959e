# SPDX-License-Identifier: Apache-2.0
"""Weights that lie inside a graph that this toolkit exported, by their names in the checkpoint."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import onnx

from surgery.verification.session import GraphFile
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError

__all__ = ["HeldTensor", "ReadableTensor", "embedded_tensors", "stacked_tensors"]

_TYPED = re.compile(r"\.(f16|bf16|f32)$")  # behind the name of one of another type than the graph's
_CODED = re.compile(r"\.(codes|scales|zero_points)$")
_MATRIX = 2
_TYPES = {1: DType.F32, 2: DType.U8, 10: DType.F16, 16: DType.BF16, 17: DType.F8_E4M3}


class ReadableTensor(Protocol):
    """A tensor of a file, or one that is held."""

    @property
    def name(self) -> str:
        """In the checkpoint."""

    @property
    def dtype(self) -> DType:
        """Element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""

    def read(self, start: int = 0, stop: int | None = None) -> Any:
        """Rows ``[start, stop)``."""


@dataclass(frozen=True, eq=False)
class HeldTensor:
    """Values in memory.

    Attributes:
        name: In the checkpoint.
        dtype: Element type.
        values: The array.
    """

    name: str
    dtype: DType
    values: np.ndarray[Any, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        shape: tuple[int, ...] = self.values.shape
        return shape

    def read(self, start: int = 0, stop: int | None = None) -> Any:
        """Rows ``[start, stop)``."""
        return self.values[start:stop]


def embedded_tensors(graph: GraphFile, rows: Mapping[str, int]) -> dict[str, HeldTensor]:
    """The weights inside a graph; several that it reads as one are parted by the `rows` of each.

    Raises:
        MalformedError: one has fewer rows than the weights that it is made of.
    """
    found: dict[str, HeldTensor] = {}
    deep = {_TYPED.sub("", tensor.name) for tensor in graph.model.graph.initializer if len(tensor.dims) > _MATRIX}
    for tensor in graph.model.graph.initializer:
        if tensor.data_type not in _TYPES or not tensor.dims or tensor.external_data:
            continue
        values = _by_rows(onnx.numpy_helper.to_array(tensor), tensor.name, deep)
        name = re.sub(r"\.rows$", ".codes", _TYPED.sub("", tensor.name))  # of a table that a head reads, too
        coded = _CODED.search(name)
        ending = coded.group() if coded else ""
        members = list(_members(name.removesuffix(ending)))
        start = 0
        for member in members:
            count = len(values) if len(members) == 1 else rows.get(member, 0)
            if start + count > len(values):
                raise MalformedError("has fewer rows than what it is made of", file=graph.path, tensor=tensor.name)
            full = f"{member}{ending}"
            found[full] = HeldTensor(full, _TYPES[tensor.data_type], values[start : start + count])
            start += count
    for name, codes in found.items():
        scales = found.get(name.removesuffix("codes") + "scales")
        if name.endswith(".codes") and codes.values.ndim == 2 and scales is not None and codes.dtype is DType.U8:
            blocks = codes.values.reshape(len(codes.values), scales.shape[1], -1)
            found[name] = replace(codes, values=blocks)
    return found


def _by_rows(values: Any, name: str, deep: Collection[str]) -> Any:
    """The parts of codes without the axis of experts; `deep` are the names that have more axes than a matrix."""
    coded = _CODED.search(_TYPED.sub("", name))
    stacked = coded is not None and f"{_TYPED.sub('', name)[: coded.start()]}.scales" in deep
    return values.reshape(-1, values.shape[-1]) if stacked else values


def stacked_tensors(found: Mapping[str, HeldTensor], stacks: Mapping[str, int]) -> dict[str, HeldTensor]:
    """Stacks of experts, of which a graph holds every entry by itself, ``name.0`` and on; `stacks` says how many each has."""
    whole: dict[str, HeldTensor] = {}
    for name, count in stacks.items():
        for ending in ("", ".codes", ".scales", ".zero_points"):
            entries = [f"{name}.{number}{ending}" for number in range(count)]
            parts = [found[entry] for entry in entries if entry in found]
            if len(parts) == count:
                join = np.concatenate if ending else np.stack  # matrices of codes lie one under the other
                values = join([part.values for part in parts])
                whole[f"{name}{ending}"] = HeldTensor(f"{name}{ending}", parts[0].dtype, values)
    return whole


def _members(name: str) -> Iterator[str]:
    """``a.q_proj+k_proj.weight`` -> ``a.q_proj.weight``, ``a.k_proj.weight``; see `surgery.onnx.graph.weights`."""
    for parts in itertools.product(*(part.split("+") for part in name.split("."))):
        yield ".".join(parts)
