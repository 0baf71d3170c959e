# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as contents of a graph's slots: exact, or refused by name.

A slot adds ``x A B`` to the result of a weight for ``x``. It holds a low-rank addition to a linear map or to the token
table, but no magnitude, rotation, bias or new values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from surgery.onnx.edit.additions import Additions, additions_of, factors_of
from surgery.onnx.graph.contract import Slot
from surgery_formats.binding.bind import Binding, bind
from surgery_formats.binding.edits import Edit
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint, Component
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
    """

    adapter: Adapter
    additions: Mapping[str, Additions]
    tables: frozenset[str]


def swappable(adapter: Adapter, checkpoint: Checkpoint, model: Model) -> Swappable:
    """Find the slots of an adapter. PEFT's copy of the base's values, saved beside a LoRA on an embedding, is ignored.

    Raises:
        FitError: an update that no slot can hold, or an adapter that does not fit the base.
    """
    if adapter.prompt is not None:
        raise FitError(
            f"{adapter.kind} is a soft prompt, which goes into no slot",
            file=adapter.path,
            hint="`prefix=` makes it swappable as keys and values",
        )
    binding = bind([(adapter, 1.0)], checkpoint, new_biases=True)
    component = checkpoint.main
    recipe = _by_stored_name(component, model)
    additions: dict[str, Additions] = {}
    tables = set()
    for edit in binding.edits.values():
        if edit.added and not edit.operations and edit.replaced is None:
            continue  # a formerly tied head with the embedding's values, which slots do not change
        loras = additions_of(edit, adapter, component)
        if not loras:
            continue
        weight = component.head if component.tied and edit.name == component.head else recipe.get(edit.name, edit.name)
        additions[weight] = loras
        if weight == model.embedding.tokens:
            tables.add(weight)
            if _head_follows(binding, component, edit):
                additions[component.head] = loras
    if not additions:
        raise FitError("the adapter changes nothing", file=adapter.path)
    return Swappable(adapter, additions, frozenset(tables))


def _by_stored_name(component: Component, model: Model) -> dict[str, str]:
    """Map stored names to the recipe's names."""
    names = {}
    for name in parameters(model):
        slices = () if name in component.parameters else component.names.resolve(name)
        names[slices[0].parameter.name if len(slices) == 1 else name] = name
    return names


def _head_follows(binding: Binding, component: Component, embedding: Edit) -> bool:
    """Whether updates of the embedding also apply to a tied head."""
    follows = component.tied and component.head and component.name not in binding.untied
    return bool(follows) and embedding.name == component.embedding


def slot_arrays(
    adapter: Swappable, slots: Iterable[Slot], sizes: Mapping[str, tuple[int, int]], dtype: Any
) -> dict[str, Array]:
    """The arrays that fill an adapter's slots, with the scale folded into B; `sizes` are rows of A and columns of B.

    Raises:
        FitError: a factor is not finite.
    """
    arrays: dict[str, Array] = {}
    for slot in slots:
        size, table = sizes[slot.weight], slot.weight in adapter.tables
        if additions := adapter.additions.get(slot.weight):
            A, B = factors_of(additions, size, table=table)
            arrays[slot.A], arrays[slot.B] = A.astype(dtype), B.astype(dtype)
    return arrays
