# SPDX-License-Identifier: Apache-2.0
"""Small parameters that adapters give in full, in a graph that somebody else made: its own tensors become optional inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.edit.readers import readers_of
from surgery.onnx.export.additions import BoundAdditions
from surgery.onnx.export.replaced import replaced_array
from surgery.onnx.export.stored_factors import stored_array
from surgery.onnx.insert.places import WeightPlace, places_of
from surgery_formats.binding.edits import Edit
from surgery_formats.containers.onnx import OnnxGraph
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

__all__ = ["ReplacedTensors", "replaced_tensors"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ReplacedTensors:
    """The tensors that became inputs, with the base's values as default.

    Attributes:
        places: Where each parameter lies.
        inputs: Names of the tensors, in the order of the graph.
    """

    places: Mapping[str, tuple[WeightPlace, ...]]
    inputs: tuple[str, ...] = ()

    def arrays(self, edits: Mapping[str, Edit], graph: OnnxGraph) -> dict[str, Array]:
        """The inputs of one adapter, by name: each as its tensor lies in the graph."""
        arrays: dict[str, Array] = {}
        for name, edit in edits.items():
            values = replaced_array(edit)
            for place in self.places[name]:
                own = values if place.by_output or values.ndim < 2 else values.T
                dtype = graph.tensors[place.tensor].dtype.numpy
                arrays[place.tensor] = np.ascontiguousarray(
                    stored_array(own.reshape(graph.shapes[place.tensor]), dtype, place.tensor)
                )
        return arrays


def replaced_tensors(
    graph: OnnxGraph, model: onnx.ModelProto, checkpoint: Checkpoint, bounds: Sequence[BoundAdditions]
) -> ReplacedTensors:
    """Make the tensors of all replaced parameters inputs of the model.

    Raises:
        FitError: a parameter is not in the graph, or not alone in a tensor that only one node reads.
    """
    edits = {name: edit for bound in bounds for name, edit in bound.replaced.items()}
    if not edits:
        return ReplacedTensors({})
    import onnx

    component = bounds[0].component
    for name, edit in edits.items():
        base = component.parameters.get(component.aliases.get(name, name))
        if base is None or base.sizes != edit.source.sizes:
            have = "none" if base is None else str(list(base.sizes))
            raise FitError(
                f"the adapter has '{show(name)}' {list(edit.source.sizes)} and the base {have}: a graph's tensor keeps its sizes",
                file=bounds[0].adapter.path,
                hint="export the base with the adapter in place of it",
            )
    places = places_of(graph, checkpoint, component, dict.fromkeys(edits, False))
    readers = readers_of(model.graph)
    initializers = {one.name: one for one in model.graph.initializer}
    known = {one.name for one in model.graph.input}
    for name, found in places.items():
        for place in found:
            tensor = initializers.get(place.tensor)
            plain = place.is_all and place.factor == 1.0 and place.tensor in graph.tensors
            if tensor is None or not plain or graph.tensors[place.tensor].packed_as:
                why = "is no tensor of its own"
            elif len(readers.get(place.tensor, ())) != 1:
                why = "has its values in a tensor that other nodes read, too"
            else:
                if place.tensor not in known:
                    value = onnx.helper.make_tensor_value_info(place.tensor, tensor.data_type, list(tensor.dims))
                    model.graph.input.append(value)
                    known.add(place.tensor)
                continue
            raise FitError(
                f"the parameter '{show(name)}', which the adapter gives in full, {why} in the graph",
                file=graph.path,
                tensor=place.tensor,
                hint="merge the adapter into the graph instead",
            )
    return ReplacedTensors(places, tuple(dict.fromkeys(place.tensor for some in places.values() for place in some)))
