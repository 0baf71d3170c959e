# SPDX-License-Identifier: Apache-2.0
"""Modules that adapters insert into a graph: baked, from a weight file of their own, or as optional inputs.

Where several adapters are swapped, modules of one form at one place share their inputs. Another form has others, since the
nodes differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.export.adapters import NamedAdapter
from surgery.onnx.graph.weights import Replaceable
from surgery_formats.canonical.inserted import InsertedModule
from surgery_formats.containers.base import FileLayout
from surgery_formats.containers.safetensors import SAFETENSORS
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.families.inserted import PlacedModule, inserted_shapes, named
from surgery_formats.models.families.recipe import Bottleneck, Coupling
from surgery_formats.tensors.unwritten import UnwrittenFile, UnwrittenTensor

__all__ = ["INSERTED", "BakedModules", "ModuleSlots", "baked_modules", "module_values", "values_at"]

INSERTED = "inserted.safetensors"
"""File name of baked modules."""

Array = npt.NDArray[Any]


def module_values(module: InsertedModule, name: str) -> dict[str, Array]:
    """The tensors of a module whose place in a graph is called `name`.

    Raises:
        FitError: a value is not finite.
    """
    before, found = f"{module.place.network.module}.", {}
    for key, values in module.values().items():
        array = np.ascontiguousarray(values, np.float32)
        if not np.isfinite(array).all():
            raise FitError("holds NaN or Inf", tensor=key)
        found[f"{name}.{key.removeprefix(before)}"] = array
    return found


def values_at(modules: Iterable[InsertedModule], names: Iterable[str]) -> dict[str, Array]:
    """The tensors of several modules, each under the name of its place.

    Raises:
        FitError: a value is not finite.
    """
    pairs = zip(modules, names, strict=True)
    return {key: values for module, name in pairs for key, values in module_values(module, name).items()}


@dataclass(frozen=True)
class BakedModules:
    """Modules that are a part of the graph.

    Attributes:
        places: What they compute, and where.
        overrides: Their tensors, by name.
        modules: The modules by the names of their places.
        layout: Of their file.
    """

    places: tuple[PlacedModule, ...]
    overrides: Mapping[str, UnwrittenTensor]
    modules: Mapping[str, InsertedModule]
    layout: FileLayout

    def data(self) -> bytes:
        """The file with their values."""
        file = bytearray(self.layout.nbytes)
        file[: len(self.layout.header)] = self.layout.header
        for name, module in self.modules.items():
            for key, array in module_values(module, name).items():
                start, nbytes = self.layout.ranges[key]
                file[start : start + nbytes] = array.tobytes()
        return bytes(file)


def baked_modules(adapters: Iterable[NamedAdapter]) -> BakedModules | None:
    """The modules of adapters, one adapter after the other; None if there are none."""
    modules = {
        f"{module.place.network.module}.{adapter.name}": module for adapter in adapters for module in adapter.modules
    }
    if not modules:
        return None
    places = tuple(named(module.place, name) for name, module in modules.items())
    shapes = {key: shape for place in places for key, shape in inserted_shapes(place.network).items()}
    layout = SAFETENSORS.lay_out([(key, DType.F32, shape) for key, shape in shapes.items()], None, 64)
    file = UnwrittenFile(Path(INSERTED), layout.nbytes, layout.header)
    overrides = {
        key: UnwrittenTensor(key, DType.F32, shape, file, *layout.ranges[key]) for key, shape in shapes.items()
    }
    return BakedModules(places, overrides, modules, layout)


@dataclass(frozen=True)
class ModuleSlots:
    """Optional inputs for the modules of swapped adapters.

    Attributes:
        places: What they compute, and where; of rank 0.
        names: The names of the places of each adapter's modules, in the order of both.
    """

    places: tuple[PlacedModule, ...]
    names: tuple[tuple[str, ...], ...]

    @staticmethod
    def of(adapters: Sequence[Sequence[InsertedModule]]) -> ModuleSlots:
        """The slots for the modules of several adapters."""
        forms: dict[tuple[str, int, str], list[PlacedModule]] = {}
        names = []
        for modules in adapters:
            own = []
            for module in modules:
                place = _emptied(module.place)
                known = forms.setdefault((place.behind, place.layer, place.network.module), [])
                if place not in known:
                    known.append(place)
                own.append(_slot_name(place, known.index(place)))
            names.append(tuple(own))
        places = tuple(
            named(place, _slot_name(place, number)) for some in forms.values() for number, place in enumerate(some)
        )
        return ModuleSlots(places, tuple(names))

    @property
    def inputs(self) -> Replaceable:
        """The inputs, with free axes for the ranks."""
        sizes = {name: shape for place in self.places for name, shape in _input_sizes(place.network)}
        return Replaceable(frozenset(sizes), sizes, frozenset(sizes))


def _emptied(place: PlacedModule) -> PlacedModule:
    network = place.network
    if isinstance(network, Coupling):
        return replace(place, network=replace(network, ranks=(0, 0)))
    return replace(place, network=replace(network, rank=0))


def _slot_name(place: PlacedModule, number: int) -> str:
    return place.network.module + (str(number + 1) if number else "")


def _input_sizes(network: Bottleneck | Coupling) -> Iterable[tuple[str, tuple[int | str, ...]]]:
    """Names and sizes of the inputs; an axis of inner values is free."""
    for name, shape in inserted_shapes(network).items():
        module = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[0]
        yield name, tuple(size or f"rank of {module}" for size in shape)
