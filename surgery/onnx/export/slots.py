# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as contents of a graph's slots: exact, or refused by name.

A slot adds ``x A B`` to the result of a weight for ``x``. It holds a low-rank addition to a linear map or to the token
table, but no magnitude, rotation or new values. Small parameters that are trained in full are optional inputs beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.export.adapters import NamedAdapter
from surgery.onnx.export.additions import Additions, additions_of, factors_of, head_follows, is_untouched, scaled
from surgery.onnx.export.replaced import is_small, own_labels, replaced_array
from surgery.onnx.export.stored_factors import stored_array, stored_factors
from surgery.onnx.graph.contract import Slot
from surgery_formats.binding.bind import bind
from surgery_formats.binding.edits import Edit
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.canonical.inserted import InsertedModule
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.families.parameters import parameters
from surgery_formats.models.families.recipe import Model

__all__ = ["Swappable", "slot_arrays", "swappable"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Swappable:
    """An adapter bound to slots.

    Attributes:
        adapter: The adapter.
        additions: The LoRAs of each slot with their views, by slot, named as in `Context`.
        tables: Slots whose weight is a table of rows.
        replaced: Edits of the small parameters that it replaces, under the recipe's names.
        modules: The modules that it inserts.
        weight: Factor of all additions.
    """

    adapter: Adapter
    additions: Mapping[str, Additions]
    tables: frozenset[str]
    replaced: Mapping[str, Edit]
    modules: tuple[InsertedModule, ...] = ()
    weight: float = 1.0


def swappable(named: NamedAdapter, checkpoint: Checkpoint, model: Model) -> Swappable:
    """Find the slots of an adapter. PEFT's copy of the base's values, saved beside a LoRA on an embedding, is ignored.

    Raises:
        FitError: an update that no slot can hold, or an adapter that does not fit the base.
    """
    adapter = named.rest
    if adapter.prompt is not None:
        raise FitError(
            f"{adapter.kind} is a soft prompt, which goes into no slot",
            file=adapter.path,
            hint="`prefix=` makes it swappable as keys and values",
        )
    component = checkpoint.main
    replaced = own_labels(adapter, component, model)
    without = [site for site in adapter.updates if site.path not in replaced]
    rest = adapter.only(without) if replaced else adapter
    binding = bind([(rest, 1.0)], checkpoint, new_biases=True) if without else None
    recipe = _by_stored_name(component, model)
    additions: dict[str, Additions] = {}
    tables = set()
    for edit in binding.edits.values() if binding else ():
        if edit.added and not edit.operations and edit.replaced is None:
            continue  # a formerly tied head with the embedding's values, which slots do not change
        if is_small(edit, component):
            if not is_untouched(edit, component):
                replaced[recipe.get(edit.name, edit.name)] = edit
            continue
        loras = additions_of(edit, adapter, component)
        if not loras:
            continue
        weight = component.head if component.tied and edit.name == component.head else recipe.get(edit.name, edit.name)
        additions[weight] = loras
        by_layer = model.embedding.per_layer
        if by_layer is not None and weight == by_layer.table:
            tables.add(weight)
        if weight == model.embedding.tokens:
            tables.add(weight)
            if binding and head_follows(binding, component, edit):
                additions[component.head] = loras
    if not additions and not replaced and not named.modules:
        raise FitError("the adapter changes nothing", file=adapter.path)
    if named.weight != 1.0 and (replaced or named.modules):
        what = "parameters in full" if replaced else "modules"
        raise FitError(f"has the weight {named.weight:g}, but {what}, which are there or not", file=adapter.path)
    return Swappable(adapter, additions, frozenset(tables), replaced, named.modules, named.weight)


def _by_stored_name(component: Component, model: Model) -> dict[str, str]:
    """Map stored names to the recipe's names."""
    names = {}
    for name in parameters(model):
        slices = () if name in component.parameters else component.names.resolve(name)
        names[slices[0].parameter.name if len(slices) == 1 else name] = name
    return names


def slot_arrays(
    adapter: Swappable,
    slots: Iterable[Slot],
    sizes: Mapping[str, tuple[int, int]],
    dtype: Any,
    inputs: Mapping[str, Any],
) -> dict[str, Array]:
    """The arrays of an adapter's inputs: its slots, with scale and weight folded into B, and the parameters that it replaces.

    Args:
        adapter: The adapter.
        slots: The graph's.
        sizes: Rows of A and columns of B.
        dtype: Type of the slots.
        inputs: Types of the inputs that replace parameters.

    Raises:
        FitError: a factor that is not finite, or that its type does not hold.
    """
    arrays: dict[str, Array] = {
        name: stored_array(replaced_array(edit), inputs[name], name, adapter.adapter.path)
        for name, edit in adapter.replaced.items()
        if name in inputs
    }
    for slot in slots:
        if factors := _slot_factors(adapter, slot, sizes[slot.weight]):
            A, B = factors
            weighted = B if adapter.weight == 1.0 else scaled(B, adapter.weight)
            arrays[slot.A], arrays[slot.B] = stored_factors(A, weighted, dtype, slot.weight, adapter.adapter.path)
    return arrays


def _slot_factors(adapter: Swappable, slot: Slot, size: tuple[int, int]) -> tuple[Array, Array] | None:
    """Both factors of a slot, without the adapter's weight; None if it adds nothing there."""
    if slot.parts:
        return _packed(adapter, slot, size)
    additions = adapter.additions.get(slot.weight)
    return factors_of(additions, size, table=slot.weight in adapter.tables) if additions else None


def _packed(adapter: Swappable, slot: Slot, size: tuple[int, int]) -> tuple[Array, Array] | None:
    """Both factors of a packed slot: of each weight side by side in A, and as blocks on the diagonal of B; None without any."""
    filled: list[tuple[Array, Array]] = []
    first = 0
    for name, width in slot.parts:
        if additions := adapter.additions.get(name):
            A, B = factors_of(additions, (size[0], width))
            wide = np.zeros((len(B), size[1]), np.float32)
            wide[:, first : first + width] = B
            filled.append((A, wide))
        first += width
    if not filled:
        return None
    return np.concatenate([A for A, _ in filled], 1), np.concatenate([B for _, B in filled], 0)
