# SPDX-License-Identifier: Apache-2.0
"""The reference with modules that adapters insert: those of adapter files, those beside a graph, and random ones in its slots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from surgery.onnx.export.adapters import NamedAdapter
from surgery.onnx.export.inserted import module_values
from surgery.reference import Reference
from surgery.verification.replaced_weights import ReplacedWeights
from surgery.verification.session import Arrays, GraphFile
from surgery_formats.models.families.inserted import PlacedModule, from_fields, inserted_shapes, named, with_inserted
from surgery_formats.models.families.recipe import Coupling, Model

__all__ = ["is_gated", "random_modules", "with_adapter_modules", "with_baked_modules"]

_RANK = 3


def with_adapter_modules(reference: Reference, adapters: Iterable[NamedAdapter]) -> Reference:
    """The reference with the modules of adapters, read from their own files."""
    places: list[PlacedModule] = []
    values: dict[str, torch.Tensor] = {}
    for adapter in adapters:
        for module in adapter.modules:
            name = f"{module.place.network.module}.{adapter.name}"
            places.append(named(module.place, name))
            values |= {key: torch.from_numpy(array) for key, array in module_values(module, name).items()}
    return _with(reference, places, values)


def with_baked_modules(reference: Reference, graph: GraphFile) -> Reference:
    """The reference with the modules that the graph's contract names, whose weights lie beside it."""
    return _with(reference, [place for place in _places(graph) if not _is_optional(place)], {})


def random_modules(graph: GraphFile, reference: Reference, draw: np.random.Generator) -> tuple[Arrays, Reference]:
    """Random values for the modules that are optional inputs, by input, and the reference with them."""
    places = [_ranked(place) for place in _places(graph) if _is_optional(place)]
    arrays: dict[str, Any] = {}
    for place in places:
        for name, shape in inserted_shapes(place.network).items():
            arrays[name] = (draw.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)
    return arrays, _with(reference, places, {name: torch.from_numpy(array) for name, array in arrays.items()})


def is_gated(model: Model) -> bool:
    """Whether a module's gate makes a token depend on those that are given together with it."""
    branches = (branch for layer in model.layers for branch in (layer.attention_branch, layer.mlp_branch))
    return any(network.form.gated for branch in branches for network in branch.inserted)


def _places(graph: GraphFile) -> list[PlacedModule]:
    return [from_fields(fields) for fields in graph.contract.inserted]


def _is_optional(place: PlacedModule) -> bool:
    network = place.network
    return not (any(network.ranks) if isinstance(network, Coupling) else network.rank)


def _ranked(place: PlacedModule) -> PlacedModule:
    network = place.network
    if isinstance(network, Coupling):
        return replace(place, network=replace(network, ranks=(_RANK, _RANK)))
    return replace(place, network=replace(network, rank=_RANK))


def _with(reference: Reference, places: list[PlacedModule], values: dict[str, torch.Tensor]) -> Reference:
    if not places:
        return reference
    weights = ReplacedWeights(reference.weights, values) if values else reference.weights
    return replace(reference, model=with_inserted(reference.model, places), weights=weights)
