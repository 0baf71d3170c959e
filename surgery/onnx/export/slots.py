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

__all__ = ["SlotArrays", "Swappable", "swappable"]

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


@dataclass(eq=False)
class SlotArrays:
    """What an adapter puts into the inputs of a graph, made slot by slot: its factors, with scale and weight in B.

    Attributes:
        adapter: The adapter.
        slots: Those that it fills, by the names of both their inputs.
        sizes: Rows of A and columns of B.
        dtype: Type of the slots.
        full: What needs no factors: parameters that it replaces, and modules.
    """

    adapter: Swappable
    slots: Mapping[str, Slot]
    sizes: Mapping[str, tuple[int, int]]
    dtype: np.dtype[Any]
    full: Mapping[str, Array]
    _last: tuple[str, tuple[Array, Array]] | None = None

    @staticmethod
    def of(
        adapter: Swappable,
        slots: Iterable[Slot],
        sizes: Mapping[str, tuple[int, int]],
        dtype: Any,
        inputs: Mapping[str, Any],
        modules: Mapping[str, Array],
    ) -> SlotArrays:
        """The arrays of an adapter.

        Args:
            adapter: The adapter.
            slots: The graph's.
            sizes: Rows of A and columns of B.
            dtype: Type of the slots.
            inputs: Types of the inputs that replace parameters.
            modules: The arrays of the modules that it inserts.

        Raises:
            FitError: a parameter that is not finite, or that its type does not hold.
        """
        replaced = {
            name: stored_array(replaced_array(edit), inputs[name], name, adapter.adapter.path)
            for name, edit in adapter.replaced.items()
            if name in inputs
        }
        filled = {name: slot for slot in slots if _loras(adapter, slot) for name in (slot.A, slot.B)}
        return SlotArrays(adapter, filled, sizes, np.dtype(dtype), {**replaced, **modules})

    @property
    def specs(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Types and shapes of all arrays."""
        found: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        for name, slot in self.slots.items():
            rank = sum(lora.rank for lora, _ in _loras(self.adapter, slot))
            rows, columns = self.sizes[slot.weight]
            found[name] = self.dtype, (rows, rank) if name == slot.A else (rank, columns)
        return found | {name: (array.dtype, array.shape) for name, array in self.full.items()}

    def make(self, name: str) -> Array:
        """One array; the other of its slot is kept until another slot is asked for.

        Raises:
            FitError: a factor that is not finite, or a product that its type does not hold.
        """
        if name in self.full:
            return self.full[name]
        slot = self.slots[name]
        if self._last is None or self._last[0] != slot.A:
            A, B = _slot_factors(self.adapter, slot, self.sizes[slot.weight])
            weighted = B if self.adapter.weight == 1.0 else scaled(B, self.adapter.weight)
            self._last = slot.A, stored_factors(A, weighted, self.dtype, slot.weight, self.adapter.adapter.path)
        return self._last[1][name == slot.B]


def _loras(adapter: Swappable, slot: Slot) -> Additions:
    """All that an adapter puts into a slot."""
    weights = [name for name, _ in slot.parts] if slot.parts else [slot.weight]
    return tuple(lora for name in weights for lora in adapter.additions.get(name, ()))


def _slot_factors(adapter: Swappable, slot: Slot, size: tuple[int, int]) -> tuple[Array, Array]:
    """Both factors of a slot that is filled, without the adapter's weight."""
    if slot.parts:
        return _packed(adapter, slot, size)
    return factors_of(adapter.additions[slot.weight], size, table=slot.weight in adapter.tables)


def _packed(adapter: Swappable, slot: Slot, size: tuple[int, int]) -> tuple[Array, Array]:
    """Both factors of a packed slot: of each weight side by side in A, and as blocks on the diagonal of B."""
    filled: list[tuple[Array, Array]] = []
    first = 0
    for name, width in slot.parts:
        if additions := adapter.additions.get(name):
            A, B = factors_of(additions, (size[0], width))
            wide = np.zeros((len(B), size[1]), np.float32)
            wide[:, first : first + width] = B
            filled.append((A, wide))
        first += width
    return np.concatenate([A for A, _ in filled], 1), np.concatenate([B for _, B in filled], 0)
