# SPDX-License-Identifier: Apache-2.0
"""The order of tensors in which a graph can use several matrices as one without a copy.

Matrices of the same input (queries, keys and values; gate and up) are one matrix if their rows lie one after the other.
safetensors files are sorted by name, which tears them apart. Vectors go to the end, so that matrices, whose sizes are
mostly multiples of a page, begin where pages begin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from surgery.engine.plan import PlannedTensor
from surgery_formats.models.component import Component
from surgery_formats.models.families.parameters import model_of
from surgery_formats.models.families.recipe import MLP, Experts, Projection

__all__ = ["PAGE", "expert_groups", "packing_groups", "packing_order"]

PAGE = 4096
"""Bytes; where the data of a packed file begins is a multiple of it."""


def packing_groups(component: Component) -> dict[str, tuple[str, ...]]:
    """Map each stored name to the names that belong beside it, in order, itself included.

    Raises:
        FitError: the architecture has no recipe.
    """
    model = model_of(component.config, frozenset(component.parameters))
    groups: dict[str, tuple[str, ...]] = {}
    for layer in model.layers:
        for inputs in (layer.attention.inputs, *(part.inputs for part in _networks(layer.mlp))):
            for names in _joint(inputs):
                stored = tuple(_stored(component, name) for name in names)
                groups |= dict.fromkeys(stored, stored)
    return groups


def expert_groups(component: Component) -> dict[str, tuple[str, ...]]:
    """Map each stored name of an expert's weights to those of all experts of its layer: gates and ups in turn, and downs."""
    model = model_of(component.config, frozenset(component.parameters))
    groups: dict[str, tuple[str, ...]] = {}
    for experts in (layer.mlp.experts for layer in model.layers if isinstance(layer.mlp, Experts)):
        for parts in ([part for one in experts for part in one.inputs], [one.output for one in experts]):
            if not any(part.stack for part in parts):
                stored = tuple(_stored(component, part.weight) for part in parts)
                groups |= dict.fromkeys(stored, stored)
    return groups


def _networks(part: MLP | Experts) -> Iterator[MLP]:
    """The network itself, or every expert."""
    if isinstance(part, MLP):
        yield part
        return
    yield from part.experts
    if part.shared is not None:
        yield part.shared


def _joint(inputs: Sequence[Projection]) -> list[list[str]]:
    """Weights of several projections, and their biases."""
    if len(inputs) < 2 or any(each.transposed or each.stack for each in inputs):
        return []
    weights, biases = [projection.weight for projection in inputs], [projection.bias for projection in inputs]
    return [weights, biases] if all(biases) else [weights]


def _stored(component: Component, name: str) -> str:
    if name in component.parameters:
        return name
    places = component.names.resolve(name)
    return places[0].parameter.name if len(places) == 1 else name


def packing_order(planned: Sequence[PlannedTensor], groups: Mapping[str, tuple[str, ...]]) -> list[PlannedTensor]:
    """The tensors of one file in packed order: matrices, then the rest.

    Groups that are complete in the file lie side by side where their first tensor was.
    """
    by_name = {tensor.name: tensor for tensor in planned}
    taken: dict[str, PlannedTensor] = {}
    for tensor in sorted(planned, key=lambda tensor: len(tensor.shape) < 2):
        group = groups.get(tensor.name, ())
        for name in group if group and all(name in by_name for name in group) else (tensor.name,):
            taken.setdefault(name, by_name[name])
    return list(taken.values())
