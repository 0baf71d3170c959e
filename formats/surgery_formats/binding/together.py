# SPDX-License-Identifier: Apache-2.0
"""Updates of one kind that several adapters bring to one weight, as PEFT's attached model computes them.

PEFT attaches adapters of one kind to one layer (``active_adapters``). Of most kinds each sees what the one before it left.
Those with `together` all see the same weight. Adapters of two kinds are merged one after the other, in PEFT as here.
"""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.arrays import Array, namespace
from surgery_formats.binding.operation import Operation
from surgery_formats.errors import FitError
from surgery_formats.tensors.apply import Apply
from surgery_formats.tensors.views import Index, intersect
from surgery_formats.text import show
from surgery_formats.updates import is_sharing

__all__ = ["side_by_side", "summed", "untouched"]


def side_by_side(operations: Sequence[Operation]) -> list[int]:
    """Of each operation the number of the first that sees the weight as it does: its own, or that of one of its kind.

    Args:
        operations: On one weight, in order.

    Raises:
        FitError: two adapters bring updates that have no meaning together, or that overlap in a part of the weight.
    """
    firsts = list(range(len(operations)))
    if len({operation.adapter for operation in operations}) < 2:
        return firsts
    for number, operation in enumerate(operations):
        if not is_sharing(operation.update):
            continue
        before = (n for n in reversed(range(number)) if intersect(operations[n].view, operation.view))
        last = next(before, None)
        if last is None or type(operations[last].update) is not type(operation.update):
            continue
        if not operation.update.together:
            raise _refused(operations[last], operation, "attached, PEFT applies the first alone")
        if operations[last].view != operation.view:
            raise _refused(operations[last], operation, "they overlap in a part of it")
        firsts[number] = firsts[last]
    return firsts


def summed(one: Apply, other: Apply) -> Apply:
    """Both changes of the same values: ``W' = U(W) + V(W) - W``."""

    def apply(block: Array, rows: Index, cols: Index) -> Array:
        change = other(namespace(block).asarray(block, copy=True), rows, cols) - block
        return one(block, rows, cols) + change

    return apply


def untouched(block: Array, rows: Index, cols: Index) -> Array:
    """What is left to do for an operation whose change another one's step makes too."""
    return block


def _refused(first: Operation, second: Operation, why: str) -> FitError:
    stored, other = second.update.tensors[0], first.update.tensors[0]
    return FitError(
        f"a second {second.update.kind} for one weight, beside '{show(str(other.path))}': {why}",
        file=stored.path,
        tensor=stored.name,
        hint="merge one, and train the other on the result",
    )
