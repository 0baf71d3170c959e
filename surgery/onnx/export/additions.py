# SPDX-License-Identifier: Apache-2.0
"""What an adapter adds to each weight, as the contents of a slot: exact, or refused by name.

A slot adds ``x A B`` to the result of a weight for ``x``. It holds a low-rank addition to a linear map, a convolution or
the token table, but no magnitude, rotation, bias or new values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery_formats.binding.bind import Binding, bind
from surgery_formats.binding.edits import Edit
from surgery_formats.binding.operation import Operation
from surgery_formats.binding.tied_edits import same_values
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.storage.base import is_stacked
from surgery_formats.tensors.views import View
from surgery_formats.updates import LoRA

__all__ = [
    "Additions",
    "BoundAdditions",
    "additions_of",
    "bound_additions",
    "factors_of",
    "head_follows",
    "is_untouched",
    "scaled",
]

Array = npt.NDArray[Any]
Additions = tuple[tuple[LoRA, View], ...]
_HINT = "merge it instead, or make LoRAs of it: surgery convert ADAPTER --to peft --as lora --rank N --base BASE -o OUT"


@dataclass(frozen=True)
class BoundAdditions:
    """What one adapter adds to the weights of its base.

    Attributes:
        adapter: The adapter.
        component: The part of the base that all of it is for.
        weights: The LoRAs of each weight, with their views, by its stored name; a tied head has its own.
        sizes: Shape of each weight: ``(out, in)``, or a convolution's.
        turned: Weights whose stored matrix has inputs as rows.
        replaced: Small parameters that it gives in full, by name.
    """

    adapter: Adapter
    component: Component
    weights: Mapping[str, Additions]
    sizes: Mapping[str, tuple[int, ...]]
    turned: frozenset[str] = frozenset()
    replaced: Mapping[str, Edit] = field(default_factory=dict)


def bound_additions(
    adapter: Adapter, checkpoint: Checkpoint, is_replaced: Callable[[Edit, Component], bool]
) -> BoundAdditions:
    """Bind an adapter and find what it adds to each weight.

    Args:
        adapter: The adapter.
        checkpoint: Its base.
        is_replaced: Whether an edit gives a small parameter in full, which an input can hold.

    Raises:
        FitError: an update that no slot can hold, an adapter that does not fit the base, or one for several networks.
    """
    if adapter.prompt is not None:
        raise FitError(f"{adapter.kind} is a soft prompt, which goes into no slot", file=adapter.path)
    binding = bind([(adapter, 1.0)], checkpoint, new_biases=True)
    names = sorted({name for name, _ in binding.edits})
    if len(names) > 1:
        raise FitError(
            "it is for several networks, and a graph is one", file=adapter.path, hint="convert one part: `component=`"
        )
    if not names:
        raise FitError("the adapter changes nothing", file=adapter.path)
    component = checkpoint.components[names[0]]
    weights: dict[str, Additions] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    replaced: dict[str, Edit] = {}
    for edit in binding.edits.values():
        if edit.added and not edit.operations and edit.replaced is None:
            continue  # a formerly tied head with the embedding's values, which slots do not change
        if is_replaced(edit, component):
            replaced[edit.name] = edit
            continue
        if not (loras := additions_of(edit, adapter, component)):
            continue
        weights[edit.name], sizes[edit.name] = loras, _sizes(edit)
        if head_follows(binding, component, edit):
            weights[component.head], sizes[component.head] = loras, sizes[edit.name]
    replaced = {name: edit for name, edit in replaced.items() if not is_untouched(edit, component)}
    if not weights and not replaced:
        raise FitError("the adapter changes nothing", file=adapter.path)
    turned = {name for name, loras in weights.items() if loras[0][1].transposed}
    return BoundAdditions(adapter, component, weights, sizes, frozenset(turned), replaced)


def is_untouched(edit: Edit, component: Component) -> bool:
    """Whether the edit merely brings the base's own values along."""
    base = component.parameters.get(component.aliases.get(edit.name, edit.name))
    return base is not None and not edit.operations and same_values(base.storage, edit.source)


def head_follows(binding: Binding, component: Component, edit: Edit) -> bool:
    """Whether the edit is of the embedding, and applies to a tied head too."""
    follows = component.tied and component.head and component.name not in binding.untied
    return bool(follows) and edit.name == component.embedding


def _sizes(edit: Edit) -> tuple[int, ...]:
    if len(edit.source.sizes) > 2:
        return tuple(edit.source.sizes)
    rows, cols = edit.source.shape
    return (cols, rows) if edit.operations[0].view.transposed else (rows, cols)


def additions_of(edit: Edit, adapter: Adapter, component: Component) -> Additions:
    """The LoRAs that are added to one weight.

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


def factors_of(additions: Additions, size: tuple[int, int], *, table: bool = False) -> tuple[Array, Array]:
    """``(inputs, rank)`` and ``(rank, outputs)``, float32, of all additions to one weight, with their scales in B.

    Args:
        additions: What is added.
        size: Inputs and outputs of the weight; of a table its rows and columns.
        table: Whether the weight is a table of rows.
    """
    parts = [_factors(lora, view, size, table=table) for lora, view in additions]
    return np.concatenate([A for A, _ in parts], 1), np.concatenate([B for _, B in parts], 0)


def _factors(lora: LoRA, view: View, size: tuple[int, int], *, table: bool) -> tuple[Array, Array]:
    """Of one addition; zero outside its view."""
    rows, cols = view.shape
    left = lora.B.load(DType.F32)[view.row_origin : view.row_origin + rows]
    right = lora.A.load(DType.F32)[:, view.col_origin : view.col_origin + cols]
    A, B = np.zeros((size[0], lora.rank), np.float32), np.zeros((lora.rank, size[1]), np.float32)
    if table:
        A[list(view.rows)], B[:, list(view.cols)] = left, right
    else:
        A[list(view.cols)], B[:, list(view.rows)] = right.T, left.T
    return A, scaled(B, lora.scale)


def scaled(values: Array, scale: float) -> Array:
    """`values` times `scale`, float32; infinite where that is too much, which `stored_factors` refuses by name."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(values * np.float32(scale), np.float32)
