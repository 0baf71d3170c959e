# SPDX-License-Identifier: Apache-2.0
"""Two adapters brought together by a base: whatever each calls a weight, the base has one name for it.

A weight may be fused for one and in parts for the other; both are compared as what they add to the base's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise

from surgery.comparison.additive import Chain
from surgery_formats.adapters.rows import Span, cut, widened
from surgery_formats.binding.bind import Binding, bind
from surgery_formats.binding.operation import Operation
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.tensors.views import View, intersect, whole
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
    notes: list[str] = []
    for key in sorted(mine.edits.keys() | theirs.edits.keys()):
        component, name = key
        called = f"{component}:{name}" if component else name
        left, right = _operations(mine, key), _operations(theirs, key)
        shape = (mine if key in mine.edits else theirs).edits[key].source.shape
        wholes = [_on_weight(side, shape) for side in (left, right)]
        if None not in wholes:
            pairs[called] = (wholes[0] or None, wholes[1] or None)
            continue
        if (bands := _in_bands(left, right, shape)) is not None:
            pairs |= {
                called if span == (0, shape[0]) else f"{called}, rows {span[0]}:{span[1]}": chains
                for span, chains in bands.items()
            }
            continue
        views = dict.fromkeys(operation.view for operation in (*left, *right))
        for number, view in enumerate(views):
            part = called if len(views) == 1 else f"{called}, part {number + 1}"
            pairs[part] = (_at(left, view) or None, _at(right, view) or None)
        if any(view != other and intersect(view, other) for view, other in combinations(views, 2)):
            notes.append(
                f"{called} is changed by kinds that cannot be cut to the same parts, so that they are not compared"
            )
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


def _in_bands(
    left: Sequence[Operation], right: Sequence[Operation], shape: tuple[int, int]
) -> dict[Span, tuple[Chain | None, Chain | None]] | None:
    """Updates by the rows that they change, cut where one of them begins or ends; None if one cannot be cut."""
    both = (*left, *right)
    if not all(_is_of_rows(operation.view, shape[1]) for operation in both):
        return None
    edges = sorted({edge for operation in both for edge in (operation.view.rows[0], operation.view.rows[-1] + 1)})
    found: dict[Span, tuple[Chain | None, Chain | None]] = {}
    for span in pairwise(edges):
        mine, theirs = _of_rows(left, span), _of_rows(right, span)
        if mine is None or theirs is None:
            return None
        if mine or theirs:
            found[span] = mine or None, theirs or None
    return found


def _is_of_rows(view: View, width: int) -> bool:
    """Whether it shows rows that follow each other, all of each."""
    straight = isinstance(view.rows, range) and view.rows.step == 1 and len(view.rows) > 0
    return straight and not view.transposed and view.cols == range(width) and view.col_origin == 0


def _of_rows(operations: Iterable[Operation], span: Span) -> Chain | None:
    """What is done to rows of the weight, which lie in one view or in none; None if an update has no part for them."""
    chain: list[Update] = []
    for operation in operations:
        start = span[0] - operation.view.rows[0]
        if 0 <= start < len(operation.view.rows):
            first = operation.view.row_origin + start
            part = cut(operation.update, [(first, first + span[1] - span[0])])
            if part is None:
                return None
            chain.append(part)
    return tuple(chain)


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
