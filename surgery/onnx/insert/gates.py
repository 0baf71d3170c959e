# SPDX-License-Identifier: Apache-2.0
"""Adapters inside a graph, each behind an input for its strength: ``y + x [A1 | A2] diag(g1, g2) [B1 ; B2]``.

A strength of 0 adds exact zeros, so that the result is the base's to the bit; any other number is as good. All adapters of
a node share two products: what more adapters cost is their rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.edit.nodes import Patch
from surgery.onnx.edit.readers import Readers, readers_of
from surgery.onnx.insert.places import WeightPlace
from surgery.onnx.insert.slots import SlotShape, Spot, add_to, check_rows_alike, kernel_of
from surgery_formats.errors import FitError
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

__all__ = ["GatedAdapter", "add_gated"]

Array = npt.NDArray[Any]
_FLOAT = 1


@dataclass(frozen=True, eq=False)
class GatedAdapter:
    """An adapter that goes into a graph.

    Attributes:
        name: Its name.
        gate: The input for its strength.
        strength: What it is by default.
        weights: What it has factors for.
        factors: Makes A and B of a weight, ``(in, rank)`` and ``(rank, out)``; the graph holds all of them soon enough.
    """

    name: str
    gate: str
    strength: float
    weights: Collection[str]
    factors: Callable[[str], tuple[Array, Array]]


def add_gated(
    model: onnx.ModelProto,
    spots: Sequence[Spot],
    shapes: Mapping[str, SlotShape],
    adapters: Sequence[GatedAdapter],
    *,
    required: bool = False,
) -> None:
    """Add the adapters to all spots, with an input ``[1]`` of float32 for the strength of each; `required` without a default.

    Raises:
        FitError: the graph has an input of that name.
    """
    import onnx

    patch = Patch(model.graph)
    for adapter in adapters:
        if not patch.is_free(adapter.gate):
            raise FitError(f"the graph has something called '{show(adapter.gate)}' already")
        model.graph.input.append(onnx.helper.make_tensor_value_info(adapter.gate, _FLOAT, [1]))
        if not required:
            patch.initializer(adapter.gate, np.array([adapter.strength], np.float32))
    readers, gates = readers_of(model.graph), _Gates(model, patch, adapters)
    for spot in spots:
        _branch(model.graph, patch, spot, shapes, gates, readers)
    patch.apply()


class _Gates:
    """The strengths of the columns of A, made once for each combination of ranks."""

    def __init__(self, model: onnx.ModelProto, patch: Patch, adapters: Sequence[GatedAdapter]) -> None:
        self._main, self._patch, self.adapters = model.graph, patch, adapters
        self._made: dict[tuple[Any, ...], str] = {}
        self._casts: dict[tuple[str, int], str] = {}

    def vector(self, ranks: Sequence[tuple[GatedAdapter, int]], element: int, axes: int) -> str:
        """A value that multiplies the columns: ``[ranks]``, or ``[1, ranks, 1 ...]`` of so many axes."""
        key = (tuple((adapter.name, rank) for adapter, rank in ranks), element, axes)
        if key not in self._made:
            parts = [self._wide(adapter, rank, element) for adapter, rank in ranks]
            value = parts[0] if len(parts) == 1 else self._node("Concat", parts, axis=0)
            if axes:
                value = self._node("Reshape", [value, self._ints(1, -1, *([1] * (axes - 2)))])
            self._patch.place(self._main, "")
            self._made[key] = value
        return self._made[key]

    def _wide(self, adapter: GatedAdapter, rank: int, element: int) -> str:
        value = adapter.gate
        if element != _FLOAT:
            if (adapter.name, element) not in self._casts:
                self._casts[adapter.name, element] = self._node("Cast", [value], to=element)
            value = self._casts[adapter.name, element]
        return value if rank == 1 else self._node("Expand", [value, self._ints(rank)])

    def _node(self, op: str, inputs: Sequence[str], **settings: Any) -> str:
        return self._patch.node(op, inputs, "strengths", **settings)

    def _ints(self, *values: int) -> str:
        return self._patch.constant(np.array(values, np.int64), "strengths")


def _branch(
    main: onnx.GraphProto,
    patch: Patch,
    spot: Spot,
    shapes: Mapping[str, SlotShape],
    gates: _Gates,
    readers: Readers,
) -> None:
    use, first = spot.use, shapes[spot.parts[0][0]]
    at = first.slot.weight.removesuffix(".weight")
    ranks: list[tuple[GatedAdapter, int]] = []
    downs, ups = [], []
    for adapter in gates.adapters:
        for name, place in spot.parts:
            if name in adapter.weights:
                A, B = adapter.factors(name)
                ranks.append((adapter, A.shape[1]))
                downs.append(A)
                ups.append(_columns(B * np.float32(use.alpha), shapes[name], place))
    if not ranks:
        return
    A, B = first.shaped(np.concatenate(downs, 1), np.concatenate(ups, 0))
    down = patch.initializer(patch.name(first.slot.A), A)
    up = patch.initializer(patch.name(first.slot.B), B)
    gate = gates.vector(ranks, first.element, len(first.down) if use.kind == "convolution" else 0)
    if use.kind == "convolution":
        settings = kernel_of(use, [place for _, place in spot.parts])
        value = patch.node("Conv", [use.x, down], at, **settings)
        delta = patch.node("Conv", [patch.node("Mul", [value, gate], at), up], at)
    else:
        if use.kind == "table":
            value = patch.node("Gather", [down, use.x], at, axis=0)
        else:
            value = patch.node("MatMul", [use.x, down], at)
        delta = patch.node("MatMul", [patch.node("Mul", [value, gate], at), up], at)
    add_to(main, patch, use, delta, at, readers)


def _columns(B: Array, shape: SlotShape, place: WeightPlace) -> Array:
    """B with the outputs that lie in a tensor, at their places among the others."""
    check_rows_alike(place, shape, "an adapter")
    B = B * np.asarray(place.factor, np.float32)
    if shape.table or len(shape.up) > 2:
        return B
    wide = np.zeros((len(B), place.width), np.float32)
    wide[:, list(place.at)] = B[:, list(place.rows)]
    return wide
