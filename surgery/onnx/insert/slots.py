# SPDX-License-Identifier: Apache-2.0
"""Slots beside the nodes of a graph: ``y + x A B`` in the place of ``y``, with A and B as inputs or as constants.

What comes out of a node with its bias is added to, as runtimes fuse the two. The result keeps its name, so that no reader of
it changes, be it another node, the body of a loop or an output of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.edit.nodes import Patch
from surgery.onnx.edit.readers import Readers, readers_of
from surgery.onnx.edit.uses import Use, attribute, uses_of
from surgery.onnx.export.stored_factors import stored_factors
from surgery.onnx.graph.contract import Slot
from surgery.onnx.insert.places import WeightPlace
from surgery_formats.errors import FitError
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

__all__ = ["SlotShape", "Spot", "add_slots", "add_to", "check_rows_alike", "kernel_of", "spots_of"]

Array = npt.NDArray[Any]
_NUMPY = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}


@dataclass(frozen=True)
class SlotShape:
    """A slot and what goes in.

    Attributes:
        slot: Its weight and the names of its inputs.
        down: Shape of A; the rank is None.
        up: Shape of B.
        element: ``TensorProto.DataType`` of both.
        table: Whether ids select rows of A.
    """

    slot: Slot
    down: tuple[int | None, ...]
    up: tuple[int | None, ...]
    element: int
    table: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the arrays."""
        if self.element == 16:
            import ml_dtypes

            bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return bfloat16
        other: np.dtype[Any] = np.dtype(_NUMPY[self.element])
        return other

    def shaped(self, A: Array, B: Array) -> tuple[Array, Array]:
        """``(in, rank)`` and ``(rank, out)`` as this slot takes them."""
        A, B = stored_factors(A, B, self.dtype, self.slot.weight)
        if len(self.down) == 2:
            return A, B
        rank = A.shape[1]
        down = A.T.reshape(rank, *(size or rank for size in self.down[1:]))
        up = B.T.reshape(B.shape[1], rank, *([1] * (len(self.up) - 2)))
        return np.ascontiguousarray(down), np.ascontiguousarray(up)


@dataclass(frozen=True, eq=False)
class Spot:
    """A node to add to, and the weights that lie in its tensor.

    Attributes:
        use: The node.
        parts: Each weight under the name of its slot, and where it lies.
    """

    use: Use
    parts: tuple[tuple[str, WeightPlace], ...]


def spots_of(
    graph: onnx.GraphProto, places: Mapping[str, Sequence[WeightPlace]], slot_of: Callable[[str, str], str | None]
) -> list[Spot]:
    """The nodes that read located weights.

    Args:
        graph: The main graph.
        places: Where each weight lies.
        slot_of: From a weight and the kind of a node that reads it to the name of the slot, or None for none.

    Raises:
        FitError: a node makes of a weight what no slot can add to.
    """
    by_tensor: dict[str, list[WeightPlace]] = {}
    for found in places.values():
        for place in found:
            by_tensor.setdefault(place.tensor, []).append(place)
    spots = []
    stored = {one.name for one in graph.initializer} | {value for node in graph.node for value in node.output}
    for tensor, here in by_tensor.items():
        if tensor not in stored:
            raise FitError(
                f"'{show(tensor)}', which is the weight '{show(here[0].weight)}', is inside the body of a node, where no slot is put",
                hint="merge the adapter into the graph instead",
            )
        for use in uses_of(graph, tensor):
            parts = []
            for place in sorted(here, key=lambda place: min(place.at)):
                if place.by_output != use.by_output:
                    raise FitError(
                        f"'{show(tensor)}' is the weight '{show(place.weight)}', and is used transposed",
                        hint="the graph was made of another model",
                    )
                name = slot_of(place.weight, use.kind)
                if name is not None:
                    parts.append((name, place))
            if parts:
                spots.append(Spot(use, tuple(parts)))
    return spots


def add_slots(
    model: onnx.ModelProto,
    spots: Sequence[Spot],
    shapes: Mapping[str, SlotShape],
    *,
    required: bool = False,
) -> None:
    """Add the slots of all spots to a model, as inputs: with a default of rank 0, or `required`."""
    patch = Patch(model.graph)
    for shape in shapes.values():
        _inputs(model.graph, shape, required=required)
    readers = readers_of(model.graph)
    for spot in spots:
        slots = [(shapes[name], place) for name, place in spot.parts]
        _branch(model.graph, patch, spot.use, slots, readers)
    patch.apply()


def _inputs(graph: onnx.GraphProto, shape: SlotShape, *, required: bool) -> None:
    import onnx

    rank = f"rank of {_module(shape.slot)}"
    for name, sizes in ((shape.slot.A, shape.down), (shape.slot.B, shape.up)):
        dims = [rank if size is None else size for size in sizes]
        graph.input.append(onnx.helper.make_tensor_value_info(name, shape.element, dims))
        if not required:
            empty = graph.initializer.add(name=name, data_type=shape.element, dims=[size or 0 for size in sizes])
            empty.raw_data = b""


def _module(slot: Slot) -> str:
    return slot.weight.removesuffix(".weight")


def _branch(
    main: onnx.GraphProto,
    patch: Patch,
    use: Use,
    slots: Sequence[tuple[SlotShape, WeightPlace]],
    readers: Readers,
) -> None:
    """Nodes that add the slots' product to the result of one node."""
    at = _module(slots[0][0].slot)
    if use.kind == "convolution":
        shape, place = slots[0]
        A = _one_more(patch, shape.slot.A, 0, len(shape.down), at)
        B = _one_more(patch, _scaled(patch, shape, place, at), 1, len(shape.up), at)
        down = patch.node("Conv", [use.x, A], at, **kernel_of(use, [place for _, place in slots]))
        delta = patch.node("Conv", [down, B], at)
    else:
        A = _joined(patch, [shape.slot.A for shape, _ in slots], 1, at)
        B = _joined(patch, [_columns(patch, shape, place, at) for shape, place in slots], 0, at)
        if use.kind == "table":
            down = patch.node("Gather", [A, use.x], at, axis=0)
        else:
            down = patch.node("MatMul", [use.x, A], at)
            if use.alpha != 1.0:
                down = patch.node("Mul", [down, patch.constant(np.array(use.alpha, slots[0][0].dtype), at)], at)
        delta = patch.node("MatMul", [down, B], at)
    add_to(main, patch, use, delta, at, readers)


def _one_more(patch: Patch, kernels: str, axis: int, ndim: int, at: str) -> str:
    """Kernels with one of zeros behind them: a convolution of no channels leaves in its result what was in the memory."""
    pads = [0] * (2 * ndim)
    pads[ndim + axis] = 1
    return patch.node("Pad", [kernels, patch.constant(np.array(pads, np.int64), at)], at)


def kernel_of(use: Use, places: Sequence[WeightPlace]) -> dict[str, Any]:
    """The settings with which a convolution steps over its inputs.

    Raises:
        FitError: its tensor is not one weight.
    """
    if len(places) != 1 or not places[0].is_all:
        raise FitError(f"the convolution '{show(use.node.name)}' has several weights in one tensor")
    return {one.name: attribute(use.node, one.name, None) for one in use.node.attribute}


def _joined(patch: Patch, values: Sequence[str], axis: int, at: str) -> str:
    return values[0] if len(values) == 1 else patch.node("Concat", values, at, axis=axis)


def _scaled(patch: Patch, shape: SlotShape, place: WeightPlace, at: str) -> str:
    """B, times what the weight was multiplied by before it was put into the graph."""
    if place.factor == 1.0:
        return shape.slot.B
    check_rows_alike(place, shape, "a slot")
    factor = np.array(place.factor, shape.dtype)
    if factor.ndim and len(shape.up) > 2:
        factor = factor.reshape(-1, *([1] * (len(shape.up) - 1)))
    return patch.node("Mul", [shape.slot.B, patch.constant(factor, at)], at)


def check_rows_alike(place: WeightPlace, shape: SlotShape, what: str) -> None:
    """Refuse a table each row of which is multiplied by a number of its own.

    Args:
        place: Where the weight lies.
        shape: Its slot.
        what: What would be added there, for the message.

    Raises:
        FitError: it is such a one.
    """
    if shape.table and isinstance(place.factor, tuple):
        raise FitError(
            f"each row of the table '{show(place.weight)}' is multiplied by a number, where {what} cannot follow",
            tensor=place.tensor,
            hint="merge the adapter into the graph instead",
        )


def _columns(patch: Patch, shape: SlotShape, place: WeightPlace, at: str) -> str:
    """B with the outputs that lie in a tensor, at their places among the others; zeros elsewhere."""
    outputs = shape.up[1] or 0
    if shape.table:
        return _scaled(patch, shape, place, at)

    def ints(*values: int) -> str:
        return patch.constant(np.array(values, np.int64), at)

    B = _scaled(patch, shape, place, at)
    if not isinstance(place.rows, range) or not isinstance(place.at, range):
        source = np.full(place.width, outputs)
        source[list(place.at)] = list(place.rows)
        wider = patch.node("Pad", [B, ints(0, 0, 0, 1)], at)  # a column of zeros for all others
        return patch.node("Gather", [wider, patch.constant(source.astype(np.int64), at)], at, axis=1)
    if len(place.rows) != outputs:
        B = patch.node("Slice", [B, ints(place.rows.start), ints(place.rows.stop), ints(1)], at)
    if not place.is_all:
        B = patch.node("Pad", [B, ints(0, place.at.start, 0, place.width - place.at.stop)], at)
    return B


def add_to(main: onnx.GraphProto, patch: Patch, use: Use, delta: str, at: str, readers: Readers) -> None:
    """Give the result of a node, behind its bias, the sum with `delta` as its value."""
    node = _with_bias(main, use, readers)
    result = node.output[0]
    before = patch.name(f"{result} without {at}")
    node.output[0] = before
    total = patch.node("Add", [before, delta], at)
    patch.rename(total, result)
    patch.place(use.graph, before)


def _with_bias(main: onnx.GraphProto, use: Use, readers: Readers) -> onnx.NodeProto:
    """The node that adds a bias to the result of `use`, if that is all that is made of it; else the node itself."""
    found = readers.get(use.y, ())
    if use.kind != "product" or len(found) != 1:
        return use.node
    inner, node = found[0]
    if inner is not use.graph or node is None or node.op_type != "Add" or list(node.input).count(use.y) != 1:
        return use.node
    other = next(value for value in node.input if value != use.y)
    bias = next((one for one in main.initializer if one.name == other), None)
    return node if bias is not None and len(bias.dims) == 1 else use.node
