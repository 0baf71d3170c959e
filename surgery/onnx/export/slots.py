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
from surgery.onnx.export.replaced import is_small, is_untouched, own_labels, replaced_array
from surgery.onnx.graph.contract import Slot
from surgery_formats.binding.bind import Binding, bind
from surgery_formats.binding.edits import Edit
from surgery_formats.binding.operation import Operation
from surgery_formats.binding.tied_edits import same_values
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.canonical.inserted import InsertedModule
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint, Component
from surgery_formats.models.families.parameters import parameters
from surgery_formats.models.families.recipe import Model
from surgery_formats.storage.base import is_stacked
from surgery_formats.tensors.views import View
from surgery_formats.updates import LoRA

__all__ = ["Swappable", "slot_arrays", "swappable"]

Array = npt.NDArray[Any]
Additions = tuple[tuple[LoRA, View], ...]
_HINT = "merge it instead (`merge=`), or make LoRAs of it: surgery convert --as lora"


@dataclass(frozen=True)
class Swappable:
    """An adapter bound to slots.

    Attributes:
        adapter: The adapter.
        additions: The LoRAs of each slot with their views, by slot, named as in `Context`.
        tables: Slots whose weight is a table of rows.
        replaced: Edits of the small parameters that it replaces, under the recipe's names.
        modules: The modules that it inserts.
    """

    adapter: Adapter
    additions: Mapping[str, Additions]
    tables: frozenset[str]
    replaced: Mapping[str, Edit]
    modules: tuple[InsertedModule, ...] = ()


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
        loras = _additions(edit, adapter, component)
        if not loras:
            continue
        weight = component.head if component.tied and edit.name == component.head else recipe.get(edit.name, edit.name)
        additions[weight] = loras
        if weight == model.embedding.tokens:
            tables.add(weight)
            if binding and _head_follows(binding, component, edit):
                additions[component.head] = loras
    if not additions and not replaced and not named.modules:
        raise FitError("the adapter changes nothing", file=adapter.path)
    return Swappable(adapter, additions, frozenset(tables), replaced, named.modules)


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


def _additions(edit: Edit, adapter: Adapter, component: Component) -> Additions:
    """Return the LoRAs that are added to one weight.

    Raises:
        FitError: an update that no slot can hold.
    """
    base = component.parameters.get(component.aliases.get(edit.name, edit.name))
    if edit.replaced is not None and (base is None or not same_values(base.storage, edit.source)):
        raise _refused("new values in place of the base's", edit, edit.replaced, adapter)
    if is_stacked(edit.source):
        raise _refused("an update of stacked experts", edit, edit.operations[0], adapter)
    additions = []
    for operation in edit.operations:
        lora = operation.update.low_rank()
        if lora is None or operation.share != 1.0:
            raise _refused(operation.update.kind, edit, operation, adapter)
        additions.append((lora, operation.view))
    if len(edit.source.shape) != 2:
        raise _refused(f"LoRA of a tensor of shape {list(edit.source.shape)}", edit, edit.operations[0], adapter)
    return tuple(additions)


def _refused(what: str, edit: Edit, operation: Operation, adapter: Adapter) -> FitError:
    return FitError(
        f"{what} for '{edit.name}': a slot holds a low-rank addition only, not this",
        file=adapter.path,
        tensor=operation.update.tensors[0].name,
        hint=_HINT,
    )


def slot_arrays(
    adapter: Swappable,
    slots: Iterable[Slot],
    sizes: Mapping[str, tuple[int, int]],
    dtype: Any,
    inputs: Mapping[str, Any],
) -> dict[str, Array]:
    """The arrays of an adapter's inputs: its slots, with the scale folded into B, and the parameters that it replaces.

    Args:
        adapter: The adapter.
        slots: The graph's.
        sizes: Rows of A and columns of B.
        dtype: Type of the slots.
        inputs: Types of the inputs that replace parameters.

    Raises:
        FitError: a factor is not finite.
    """
    arrays: dict[str, Array] = {
        name: replaced_array(edit).astype(inputs[name]) for name, edit in adapter.replaced.items()
    }
    for slot in slots:
        size, table = sizes[slot.weight], slot.weight in adapter.tables
        parts = [_factors(lora, view, size, table=table) for lora, view in adapter.additions.get(slot.weight, ())]
        if parts:
            arrays[slot.A] = np.concatenate([A for A, _ in parts], 1).astype(dtype)
            arrays[slot.B] = np.concatenate([B for _, B in parts], 0).astype(dtype)
    return arrays


def _factors(lora: LoRA, view: View, size: tuple[int, int], *, table: bool) -> tuple[Array, Array]:
    """``(inputs, rank)`` and ``(rank, outputs)``, float32, of one addition; zero outside its view."""
    rows, cols = view.shape
    left = lora.B.load(DType.F32)[view.row_origin : view.row_origin + rows]
    right = lora.A.load(DType.F32)[:, view.col_origin : view.col_origin + cols]
    A, B = np.zeros((size[0], lora.rank), np.float32), np.zeros((lora.rank, size[1]), np.float32)
    if table:
        A[list(view.rows)], B[:, list(view.cols)] = left, right
    else:
        A[list(view.cols)], B[:, list(view.rows)] = right.T, left.T
    return A, B * np.float32(lora.scale)
