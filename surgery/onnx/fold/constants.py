# SPDX-License-Identifier: Apache-2.0
"""Values of a graph that depend on no input: what initializers, constants and defaults of optional inputs make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery_formats.containers.onnx import OnnxGraph
from surgery_formats.errors import FitError
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

__all__ = ["Constants"]

Array = npt.NDArray[Any]
_RANDOM = ("RandomNormal", "RandomUniform", "Multinomial", "Bernoulli")
_NODES = 200  # that one small value is made of


class Constants:
    """The constants of a main graph, worked out when they are asked for.

    Args:
        graph: The file, which has the values of its weights.
        model: The model that is edited.
        given: Values of inputs, in place of their defaults; read anew whenever they are asked for.
        defaults: Whether the defaults of optional inputs are constants, too.
    """

    def __init__(
        self, graph: OnnxGraph, model: onnx.ModelProto, given: Mapping[str, Array], *, defaults: bool = True
    ) -> None:
        self._graph, self._model = graph, model
        self._given, self._known = given, dict[str, Array]()
        inputs = set() if defaults else {one.name for one in model.graph.input}
        self._initializers = {one.name: one for one in model.graph.initializer if one.name not in inputs}

    @cached_property
    def _producers(self) -> dict[str, onnx.NodeProto]:
        return {value: node for node in self._model.graph.node for value in node.output if value}

    @cached_property
    def _constant(self) -> set[str]:
        names = {*self._initializers, *self._given}
        for node in self._model.graph.node:
            fixed = all(not value or value in names for value in node.input)
            if fixed and node.op_type not in _RANDOM and not any(one.HasField("g") for one in node.attribute):
                names |= set(node.output)
        return names

    def __contains__(self, name: str) -> bool:
        return name in self._constant

    def initializer(self, name: str) -> onnx.TensorProto | None:
        """The initializer of this name that no value was given for."""
        return None if name in self._given else self._initializers.get(name)

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node of the main graph that makes a value."""
        return self._producers.get(name)

    def value(self, name: str) -> Array:
        """The value of a constant.

        Raises:
            FitError: it is made in a way that is not followed.
        """
        if name in self._given:
            return self._given[name]
        if name in self._known:
            return self._known[name]
        if name in self._initializers:
            return self._stored(name)
        self._known[name] = self._computed(name)
        return self._known[name]

    def reader(self, name: str) -> Callable[[], Array]:
        """What gives the value of a constant, also when the model has changed; only what no file has is held until then.

        Raises:
            FitError: as `value`.
        """
        if name in self._given:
            return partial(self._given.__getitem__, name)
        tensor = self._graph.tensors.get(name)
        if name in self._initializers and tensor is not None and not tensor.packed_as:
            return partial(self._stored, name)
        return partial(_same, self.value(name))

    def _stored(self, name: str) -> Array:
        import onnx

        tensor = self._graph.tensors.get(name)
        if tensor is not None and not tensor.packed_as:
            return np.asarray(tensor.read()).reshape(self._graph.shapes[name])
        if name in self._graph.small:
            return np.asarray(self._graph.small[name])
        return np.asarray(onnx.numpy_helper.to_array(self._initializers[name]))

    def _computed(self, name: str) -> Array:
        import onnx
        from onnx.reference import ReferenceEvaluator

        nodes: dict[int, onnx.NodeProto] = {}
        leaves: dict[str, Array] = {}
        pending = [name]
        while pending:
            value = pending.pop()
            node = self._producers.get(value)
            if value in self._given or value in self._known or node is None:
                leaves[value] = self.value(value)
            elif id(node) not in nodes:
                nodes[id(node)] = node
                pending += [one for one in node.input if one]
            if len(nodes) > _NODES:
                raise FitError(f"'{show(name)}' is made of too many nodes", file=self._graph.path)
        order = [node for node in self._model.graph.node if id(node) in nodes]
        inputs = [onnx.helper.make_empty_tensor_value_info(leaf) for leaf in leaves]
        graph = onnx.helper.make_graph(order, "part", inputs, [onnx.helper.make_empty_tensor_value_info(name)])
        part = onnx.helper.make_model(graph, opset_imports=self._model.opset_import)
        try:
            results: Any = ReferenceEvaluator(part).run([name], leaves)
            return np.asarray(results[0])
        except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
            raise FitError(
                f"'{show(name)}' cannot be worked out ({show(error, 200)})", file=self._graph.path
            ) from error


def _same(values: Array) -> Array:
    return values
