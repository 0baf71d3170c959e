# SPDX-License-Identifier: Apache-2.0
"""The edit of one weight of an output as data, and the equations that apply it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery_formats.binding.operation import Operation
from surgery_formats.binding.together import side_by_side, summed, untouched
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import Storage
from surgery_formats.tensors.apply import Apply
from surgery_formats.tensors.views import View
from surgery_formats.updates import blend, is_of_base
from surgery_formats.updates.weights import WeightView

__all__ = ["Edit", "prepared", "seen_by"]


@dataclass(frozen=True, slots=True)
class Edit:
    """All operations on one weight of the output.

    Attributes:
        component: Part of a pipeline, or empty.
        name: Name of the weight in the output.
        source: Where its values come from: the base, or the adapter that replaces them.
        operations: In order.
        replaced: The replacement whose values `source` holds, if it is not the base's.
        added: Whether the base has no weight of this name (a head for a task, a head that was tied).
        why: The reason, for the ledger, where it is not obvious.
    """

    component: str
    name: str
    source: Storage
    operations: tuple[Operation, ...]
    replaced: Operation | None = None
    added: bool = False
    why: str = ""


def prepared(
    operations: Sequence[Operation], source: Storage, dtype: DType, height: int, device: str = "cpu"
) -> list[tuple[View, Apply]]:
    """The equations of `operations` for `apply_chain`, with their factors loaded.

    Args:
        operations: In order.
        source: The weight they begin with.
        dtype: Precision of the arithmetic.
        height: Storage rows per block for updates that read the weight first.
        device: Where the arithmetic runs.

    Returns:
        A step for each operation. Of those that act side by side, the first one's step does what all of them do.

    Raises:
        FitError: a factor holds NaN or Inf.
    """
    chain: list[tuple[View, Apply]] = []
    for number, (operation, first) in enumerate(zip(operations, side_by_side(operations), strict=True)):
        apply = operation.update.prepare(seen_by(first, operations, chain, source, dtype, height, device))
        apply = apply if operation.share == 1.0 else blend(apply, operation.share)
        if first < number:
            view, others = chain[first]
            chain[first], apply = (view, summed(others, apply)), untouched
        chain.append((operation.view, apply))
    return chain


def seen_by(
    number: int,
    operations: Sequence[Operation],
    chain: Sequence[tuple[View, Apply]],
    source: Storage,
    dtype: DType,
    height: int,
    device: str = "cpu",
) -> WeightView:
    """The weight that an operation looks at before it acts.

    It is what the operations before it left. Only a DoRA, which measures rows, and what takes a part of the base away
    look at it without what *other* adapters did: they were trained on the base, and so PEFT computes them, attached. Of two
    DoRAs ``W' = m_b / ||W + s_b B_b A_b|| * (m_a / ||W + s_a B_a A_a|| * (W + s_a B_a A_a) + s_b B_b A_b)``.

    Args:
        number: Which of `operations`.
        operations: In order.
        chain: The equations of those before it, and perhaps of more.
        source: The weight they begin with.
        dtype: Precision of the arithmetic.
        height: Storage rows per block.
        device: Where the arithmetic runs.
    """
    operation, earlier = operations[number], tuple(chain[:number])
    if is_of_base(operation.update):
        owners = (before.adapter for before in operations[:number])
        earlier = tuple(step for step, owner in zip(earlier, owners, strict=True) if owner == operation.adapter)
    return WeightView(source, earlier, operation.view, dtype, device, height)
