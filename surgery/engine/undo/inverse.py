# SPDX-License-Identifier: Apache-2.0
"""The inverse of a chain of operations: from the values after them to an estimate of the values before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from surgery_formats.arrays import Array, assign, empty, namespace
from surgery_formats.binding.edits import prepared, seen_by
from surgery_formats.binding.operation import Operation
from surgery_formats.binding.together import side_by_side
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import Storage
from surgery_formats.tensors.apply import Apply, apply_chain
from surgery_formats.tensors.views import View
from surgery_formats.updates import is_invertible, is_linear, unblend
from surgery_formats.updates.weights import WeightView

__all__ = ["Chain", "Estimate", "estimates", "inverted", "lost_by", "why_not"]

Chain = Sequence[tuple[View, Apply]]


def lost_by(operations: Sequence[Operation], before: Storage, height: int) -> tuple[Array | None, ...]:
    """What the result of each operation does not tell of the weight before it (`updates.Invertible.lost`)."""
    found: list[Array | None] = []
    chain = prepared(operations, before, DType.F64, height) if any(map(_may_lose, operations)) else []
    for number, operation in enumerate(operations):
        update = operation.update
        if _may_lose(operation) and is_invertible(update):
            found.append(update.lost(seen_by(number, operations, chain, before, DType.F64, height)))
        else:
            found.append(None)
    return tuple(found)


def _may_lose(operation: Operation) -> bool:
    return is_invertible(operation.update) and operation.update.needs_weight


def inverted(operations: Sequence[Operation], after: Storage, height: int, lost: Sequence[Array | None]) -> Chain:
    """The inverses in float64, last operation first. What has no inverse is left as it is.

    Args:
        operations: As they were applied.
        after: The weight after them.
        height: Storage rows per block.
        lost: Of each operation, see `lost_by`.

    Raises:
        FitError: a factor holds NaN or Inf.
    """
    chain: list[tuple[View, Apply]] = []
    for operation, vector in reversed(list(zip(operations, lost, strict=True))):
        weight = WeightView(after, tuple(chain), operation.view, DType.F64, "cpu", height)
        update, share = operation.update, operation.share
        if is_linear(update):
            chain.append((operation.view, update.scaled(-1.0).prepare(weight)))
        elif is_invertible(update) and (vector is not None or not update.needs_weight):
            chain.append((operation.view, update.inverse(weight, share, vector)))
        elif update.effect == "sets" and share != 1.0:
            chain.append((operation.view, unblend(update.prepare(weight), share)))
    return chain


def why_not(operations: Sequence[Operation]) -> str:
    """Why the weight before some operations cannot be computed from the one after them; empty if it can."""
    if any(first < number for number, first in enumerate(side_by_side(operations))):
        return f"several {operations[0].update.kind} act side by side"
    return next(filter(None, map(_why_not, operations)), "")


def _why_not(operation: Operation) -> str:
    update = operation.update
    if update.effect == "sets":
        return "" if operation.share != 1.0 else f"{update.kind}: the values before were replaced"
    if is_linear(update):
        return ""
    if not is_invertible(update):
        return f"{update.kind} has no inverse here"
    return f"{update.kind}: the lengths of the rows before are not in the result" if update.needs_weight else ""


class Estimate(NamedTuple):
    """A block of an estimate.

    Attributes:
        start: First row.
        stop: Row after the last.
        after: The values after the operations, in their own type.
        before: The estimate of those before, in float64, finite.
        largest: No value of either is greater.
    """

    start: int
    stop: int
    after: Array
    before: Array
    largest: float


def estimates(after: Storage, chain: Chain, height: int) -> Iterator[Estimate]:
    """Every block in turn, each good until the next.

    What a 0 has swallowed becomes 0.
    """
    rows, cols = after.shape
    stored = empty((min(height, rows), cols), after.dtype)
    block = empty(stored.shape, DType.F64)
    xp = namespace(block)
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        values, estimate = stored[: stop - start], block[: stop - start]
        after.read_into(values, start)
        assign(estimate, values)
        largest = _largest(estimate)
        with xp.errstate(divide="ignore", over="ignore", invalid="ignore"):
            apply_chain(chain, estimate, start, stop)
        own = _largest(estimate)
        if not math.isfinite(own):
            estimate[~xp.isfinite(estimate)] = 0
            own = _largest(estimate)
        yield Estimate(start, stop, values, estimate, max(largest, own))


def _largest(block: Array) -> float:
    """NaN if a value is."""
    return max(float(block.max()), -float(block.min()))
