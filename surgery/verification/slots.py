# SPDX-License-Identifier: Apache-2.0
"""A graph with filled LoRA slots, and the reference that it must equal: the same weights with ``A B`` added.

The factors are random: a slot that is connected to another weight, scaled or missing shows at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch

from surgery.onnx.export.merged import with_biases
from surgery.onnx.graph.contract import Slot
from surgery.reference import Reference
from surgery.reference.weights import ReferenceWeights
from surgery.verification.inserted import random_modules
from surgery.verification.replaced_weights import ReplacedWeights
from surgery.verification.sentence import own_task
from surgery.verification.session import Arrays, GraphFile
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.models.families.parameters import model_of, parameters, projections
from surgery_formats.models.families.recipe import LanguageHead, Model
from surgery_formats.text import show

__all__ = ["random_slots", "with_defaults"]

_RANK, _SEED, _SIZE = 2, 23, 0.3


def random_slots(graph: GraphFile, reference: Reference) -> tuple[Arrays, Reference] | None:
    """Random factors for every slot, by input, and the reference with them; None for a graph without slots.

    Raises:
        ProofError: slots and inputs of the graph differ, or a slot is for a weight that the model lacks.
    """
    contract = graph.contract
    slots = contract.slots
    sizes = {
        port.name: [dim.dim_value for dim in port.type.tensor_type.shape.dim]
        for port in graph.model.graph.input
        if not contract.is_run_input(port.name)
    }
    slot_inputs = [*contract.slot_inputs, *contract.replaceable]
    if sorted(slot_inputs) != sorted(sizes):
        differing = min(set(slot_inputs) ^ set(sizes), default=min(slot_inputs, default=""))
        raise ProofError("inputs of the graph and slots of its contract differ", file=graph.path, tensor=differing)
    if not slot_inputs:
        return None
    model, weights = _own_head(reference.model, {name for slot in slots for name in slot.weights}, reference.weights)
    shapes = _matrices(model)
    shapes |= {slot.weight: _side_by_side(slot, shapes, graph) for slot in slots if slot.parts}
    draw = np.random.default_rng(_SEED)
    arrays: dict[str, Any] = {}
    added: dict[str, torch.Tensor] = {}
    for slot in slots:
        if slot.weight not in shapes:
            raise ProofError(
                f"a slot of the graph is for '{show(slot.weight)}', which the model lacks", file=graph.path
            )
        inputs, outputs, stored_by_input = shapes[slot.weight]
        if _is_rounded(model, weights, slot.weight):
            continue
        if [sizes[slot.A][:1], sizes[slot.B][1:]] != [[inputs], [outputs]]:
            raise ProofError(f"the size of the slot differs from {outputs} x {inputs}", file=graph.path, tensor=slot.A)
        A = (draw.normal(size=(inputs, _RANK)) / np.sqrt(inputs)).astype(np.float32)
        B = (draw.normal(size=(_RANK, outputs)) * _SIZE).astype(np.float32)
        arrays |= {slot.A: A, slot.B: B}
        product = torch.from_numpy(A @ B)
        if slot.parts:
            columns = torch.split(product, [width for _, width in slot.parts], dim=1)
            added |= {name: part.T for (name, _), part in zip(slot.parts, columns, strict=True)}
        else:
            added[slot.weight] = product if stored_by_input else product.T
    modules, reference = random_modules(graph, replace(reference, model=model, weights=weights), draw)
    replaced = _replaced(graph, model, modules.keys(), draw)
    arrays |= modules | {name: values.astype(np.float32) for name, values in replaced.items()}
    changed = ReplacedWeights(reference.weights, {name: torch.from_numpy(values) for name, values in replaced.items()})
    return arrays, replace(reference, weights=_SummedWeights(changed, added))


def _side_by_side(slot: Slot, shapes: Mapping[str, tuple[int, int, bool]], graph: GraphFile) -> tuple[int, int, bool]:
    """Inputs and outputs of a packed slot.

    Raises:
        ProofError: the model lacks one of its weights, or has it in another size.
    """
    known = [shapes.get(name) for name, _ in slot.parts]
    for (name, width), shape in zip(slot.parts, known, strict=True):
        if shape is None or shape != (shape[0], width, False):
            raise ProofError(
                f"a packed slot of the graph is for '{show(name)}' with {width} outputs, which the model has not",
                file=graph.path,
            )
    widths = {shape[0] for shape in known if shape is not None}
    if len(widths) != 1:
        raise ProofError("a packed slot is for weights of several inputs", file=graph.path, tensor=slot.A)
    return widths.pop(), sum(width for _, width in slot.parts), False


def _replaced(
    graph: GraphFile, model: Model, modules: Collection[str], draw: np.random.Generator
) -> dict[str, np.ndarray[Any, Any]]:
    """Random values for every parameter that can be replaced; a classifier gets one label more than the base has.

    Raises:
        ProofError: a parameter that the model lacks, or an input of other sizes.
    """
    shapes, found = parameters(model), {}
    ports = {port.name: port.type.tensor_type.shape.dim for port in graph.model.graph.input}
    for name in (name for name in graph.contract.replaceable if name not in modules):
        if (shape := shapes.get(name)) is None:
            raise ProofError(f"'{show(name)}' can be replaced, but the model lacks it", file=graph.path)
        dims = [dim.dim_value or None for dim in ports[name]]
        if len(dims) != len(shape) or any(dim not in (None, size) for dim, size in zip(dims, shape, strict=True)):
            raise ProofError(f"an input has other sizes than {list(shape)}", file=graph.path, tensor=name)
        sizes = [size + 1 if dim is None else size for dim, size in zip(dims, shape, strict=True)]
        found[name] = draw.normal(size=sizes) * _SIZE
    return found


def with_defaults(graph: GraphFile, reference: Reference) -> Reference:
    """The reference with the head and the biases that only adapters have, at the graph's own defaults.

    The configuration beside the graph names the head.
    """
    stored = {tensor.name: tensor for tensor in graph.model.graph.initializer if not tensor.external_data}
    absent = {name for name in graph.contract.replaceable if not _has(reference.weights, name)} & stored.keys()
    if not absent:
        return reference
    values = {name: torch.from_numpy(onnx.numpy_helper.to_array(stored[name]).astype(np.float32)) for name in absent}
    weights = ReplacedWeights(reference.weights, values)
    model = model_of(read_object(graph.path.parent / "config.json"), weights.names, own_task(graph.contract))
    return replace(reference, model=with_biases(model, weights.names), weights=weights)


def _has(weights: ReferenceWeights, name: str) -> bool:
    try:
        return bool(weights.load(name, 0, 1).numel())
    except FitError:
        return False


def _own_head(model: Model, slots: Collection[str], weights: ReferenceWeights) -> tuple[Model, ReferenceWeights]:
    """Give a tied head its own name, that of its slot if it has one, so that the table's additions do not affect it."""
    head, known = model.head, _matrices(model)
    if not isinstance(head, LanguageHead) or head.projection.weight != model.embedding.tokens:
        return model, weights
    name = next((name for name in sorted(slots) if name not in known), f"{model.embedding.tokens} of the head")
    own = replace(head, projection=replace(head.projection, weight=name))
    return replace(model, head=own), _RenamedWeights(weights, {name: head.projection.weight})


def _is_rounded(model: Model, weights: ReferenceWeights, name: str) -> bool:
    """Whether `name` is a table whose scale is rounded to the type of its values, which does not hold for a sum."""
    table = model.embedding
    tables = [table.tokens] if table.scale_rounded else []
    tables += [table.per_layer.table] if table.per_layer else []
    return name in tables and weights.load(name, 0, 1).dtype is not torch.float32


def _matrices(model: Model) -> dict[str, tuple[int, int, bool]]:
    """Inputs, outputs, and whether rows are inputs, by name of the weight."""
    shapes = {
        projection.weight: (projection.inputs, projection.outputs, projection.transposed)
        for projection in projections(model)
    }
    table = model.embedding
    width = table.projection.inputs if table.projection else model.hidden
    if (own := table.per_layer) is not None:
        shapes[own.table] = (own.rows, own.projection.outputs, True)
    return shapes | {table.tokens: (model.vocabulary, width, True)}


@dataclass(frozen=True)
class _RenamedWeights:
    inner: ReferenceWeights
    renames: Mapping[str, str]

    @property
    def names(self) -> Collection[str]:
        return {*self.inner.names, *self.renames}

    def load(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.inner.load(self.renames.get(name, name), start, stop)


@dataclass(frozen=True)
class _SummedWeights:
    inner: ReferenceWeights
    added: Mapping[str, torch.Tensor]

    @property
    def names(self) -> Collection[str]:
        return self.inner.names

    def load(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        values = self.inner.load(name, start, stop)
        return values.float() + self.added[name][start:stop] if name in self.added else values
