# SPDX-License-Identifier: Apache-2.0
"""Which codes a merge with a residual moves: those where what is left afterwards takes the smaller LoRA.

With the codes as they are, a LoRA of the base holds the whole update: exactly, if the update is low-rank and no rank is
asked for. With codes that moved it holds what rounding lost. That is less, but it is noise, which no few directions
hold: so codes move where a step of the format is small beside the update (8 bits), or where the update is no LoRA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy

from surgery.engine.arithmetic import check_finite
from surgery.engine.blocks import block_height
from surgery.engine.plan import Compute, Requantise
from surgery.engine.quantised.output import QuantisedOutput
from surgery.engine.quantised.requantise import WeightRequantiser
from surgery_formats.arrays import Array, energy
from surgery_formats.binding.bind import Binding
from surgery_formats.binding.edits import Edit, prepared
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.svd import TruncatedSVD, truncated_svd
from surgery_formats.storage.base import Storage
from surgery_formats.storage.quantised import is_quantised
from surgery_formats.threads import one_thread

__all__ = ["Goal", "base_of", "coded_edits", "goal_of", "is_held", "leading", "without_kept"]

_USUAL = 16
"""Rank for an update that is no LoRA, if none is asked for."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What the LoRA of one weight shall be.

    Attributes:
        rank: At most.
        error: At most, relative to the norm of the update; None where any is taken.
    """

    rank: int
    error: float | None


def coded_edits(binding: Binding) -> dict[tuple[str, str], Edit]:
    """The edits of weights that are stored as codes."""
    return {
        key: edit
        for key, edit in binding.edits.items()
        if (weight := base_of(binding, edit)) is not None and weight.elements is None and weight.is_float
    }


def base_of(binding: Binding, edit: Edit) -> Storage | None:
    """The base's weight that an edit changes, or None if it is a new one."""
    parameter = binding.checkpoint.components[edit.component].parameters.get(edit.name)
    return None if parameter is None or edit.added else parameter.storage


def is_held(edit: Edit, goal: Goal) -> bool:
    """Whether a LoRA within a goal is exactly what an edit adds, without a search for its directions."""
    exact = _exact_rank(edit)
    return exact is not None and goal.error is None and goal.rank >= exact


def _exact_rank(edit: Edit) -> int | None:
    """The rank of a LoRA that is exactly what an edit adds, or None if there is none."""
    loras = [operation.update.low_rank() if operation.share == 1.0 else None for operation in edit.operations]
    return None if any(lora is None for lora in loras) else sum(lora.rank for lora in loras if lora is not None)


def goal_of(edit: Edit, options: QuantisedOutput) -> Goal:
    """What was asked for, for one weight."""
    ranks = [operation.update.rank or 0 for operation in edit.operations]
    usual = _exact_rank(edit) or max(_USUAL, sum(ranks))
    return Goal(options.rank or usual, options.max_error)


def without_kept(binding: Binding, options: QuantisedOutput) -> Binding:
    """The binding without the edits of weights whose codes stay; what they use is in the LoRA.

    Raises:
        FitError: the LoRA of a weight would be further off than was asked for.
    """
    with one_thread():
        kept = {
            key: edit
            for key, edit in coded_edits(binding).items()
            if edit.replaced is not None or _stays(binding, edit, options)
        }
    in_lora = {
        tensor
        for edit in kept.values()
        for operation in (*edit.operations, *([edit.replaced] if edit.replaced else []))
        for tensor in operation.update.tensors
    }
    return replace(
        binding,
        edits={key: edit for key, edit in binding.edits.items() if key not in kept},
        settled=(*binding.settled, *sorted(in_lora, key=lambda tensor: tensor.name)),
    )


def _stays(binding: Binding, edit: Edit, options: QuantisedOutput) -> bool:
    """Whether the codes of a weight stay as they are."""
    weight, goal = base_of(binding, edit), goal_of(edit, options)
    assert weight is not None
    if len(weight.sizes) == 3:
        raise FitError("no LoRA beside a stack of experts is written yet", tensor=edit.name)
    if not is_quantised(weight) or is_held(edit, goal):
        return True
    update, left = _both(edit, weight)
    size = math.sqrt(energy(update))
    if not size:
        return True
    whole, rest = leading(update, goal, size), leading(left, goal, size)
    errors = [found.residual / size for found in (whole, rest)]
    if goal.error is not None:
        fits = [error <= goal.error for error in errors]
        if not any(fits):
            raise FitError(
                f"a LoRA of rank {goal.rank} leaves {min(errors):.2%} of the update",
                tensor=edit.name,
                hint=f"`max_error={goal.error:g}` takes a higher `rank=`",
            )
        if all(fits):
            return len(whole.S) <= len(rest.S)
        return fits[0]
    return errors[0] <= errors[1]


def leading(matrix: Array, goal: Goal, size: float) -> TruncatedSVD:
    """The best LoRA of a matrix within a goal.

    Args:
        matrix: ``(out, in)``, float32.
        goal: What it shall be.
        size: Norm of the update that `Goal.error` is relative to.
    """
    rank = min(goal.rank, *matrix.shape)
    total = math.sqrt(energy(matrix))
    if goal.error is None or not total:
        return truncated_svd(matrix, rank=rank)
    share = goal.error * size / total
    if share >= 1:
        return truncated_svd(numpy.zeros_like(matrix), rank=rank, max_error=0.5)._replace(residual=total)
    return truncated_svd(matrix, rank=rank, max_error=share)


def _both(edit: Edit, weight: Storage) -> tuple[Array, Array]:
    """The update, and what rounding to nearest leaves of it: ``(out, in)``, float32."""
    step = Compute(edit.source, edit.operations, weight, Requantise("nearest"))
    height = block_height(weight.shape[1], step)
    update, left = (numpy.empty(weight.shape, numpy.float32) for _ in range(2))
    chain = prepared(step.operations, step.source, DType.F32, height)
    for block in WeightRequantiser(step, chain, "cpu").blocks(
        lambda values: check_finite(values, DType.F32, edit.name)
    ):
        rows = slice(block.start, block.start + len(block.wanted))
        update[rows] = block.wanted - block.stored
        left[rows] = block.wanted - block.rounded
    return (update.T, left.T) if weight.transposed else (update, left)
