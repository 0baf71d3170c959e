# SPDX-License-Identifier: Apache-2.0
"""Two adapters brought together by a base: whatever each calls a weight, the base has one name for it.

A weight may be fused for one and in parts for the other; both are compared as what they add to the base's own.
"""

from __future__ import annotations

from collections.abc import Iterable

from surgery.comparison.additive import Chain
from surgery_formats.adapters.rows import widened
from surgery_formats.binding.bind import Binding, bind
from surgery_formats.binding.operation import Operation
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.tensors.views import View, whole
from surgery_formats.updates import Update

__all__ = ["pairs_on"]


def pairs_on(
    base: Checkpoint, a: Adapter, b: Adapter
) -> tuple[dict[str, tuple[Chain | None, Chain | None]], list[str]]:
    """The updates of each weight of `base` beside each other, and notes.

    Raises:
        FitError: one of them does not fit the base.
    """
    mine, theirs = (bind([(adapter, 1.0)], base) for adapter in (a, b))
    pairs: dict[str, tuple[Chain | None, Chain | None]] = {}
    for key in sorted(mine.edits.keys() | theirs.edits.keys()):
        component, name = key
        called = f"{component}:{name}" if component else name
        left, right = _operations(mine, key), _operations(theirs, key)
        shape = (mine if key in mine.edits else theirs).edits[key].source.shape
        wholes = [_on_weight(side, shape) for side in (left, right)]
        if None not in wholes:
            pairs[called] = (wholes[0] or None, wholes[1] or None)
            continue
        views = dict.fromkeys(operation.view for operation in (*left, *right))
        for number, view in enumerate(views):
            part = called if len(views) == 1 else f"{called}, part {number + 1}"
            pairs[part] = (_at(left, view) or None, _at(right, view) or None)
    notes = []
    if mine.untied != theirs.untied:
        notes.append("in this base, head and embedding are one tensor: one of them changes both, the other does not")
    return pairs, notes


def _operations(binding: Binding, key: tuple[str, str]) -> tuple[Operation, ...]:
    edit = binding.edits.get(key)
    if edit is None:
        return ()
    return (*((edit.replaced,) if edit.replaced else ()), *edit.operations)


def _at(operations: Iterable[Operation], view: View) -> Chain:
    return tuple(operation.update for operation in operations if operation.view == view)


def _on_weight(operations: Iterable[Operation], shape: tuple[int, int]) -> Chain | None:
    """The updates as updates of the stored weight itself; None if one is of a part and no LoRA."""
    chain: list[Update] = []
    for operation in operations:
        if operation.view == whole(shape) and operation.update.shape == shape:
            chain.append(operation.update)
        elif (lora := operation.update.low_rank()) is not None and operation.update.effect == "adds":
            chain.append(widened(lora, operation.view, shape))
        else:
            return None
    return tuple(chain)
