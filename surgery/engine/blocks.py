# SPDX-License-Identifier: Apache-2.0
"""The blocks in which a weight is computed: their height, and the memory that takes. Imported without numpy."""

from __future__ import annotations

import math

from surgery.engine.plan import Compute, PlannedTensor
from surgery_formats.updates import is_holding, is_mixing

__all__ = ["BLOCK_ELEMENTS", "block_bytes", "block_height", "row_group"]

BLOCK_ELEMENTS = 1 << 19
"""Elements per block: 2 MB of float32, which stays in a core's cache between the steps. Fixed, so that results depend
on nothing else."""
_REQUANTISED = 4
"""Times as many elements where codes are chosen again: their steps along the inputs have a cost of their own."""


def block_height(width: int, step: Compute) -> int:
    """Storage rows per block.

    A multiple of the rows that can be put alone, and of the columns that are mixed where the storage holds them as
    rows.
    """
    elements = BLOCK_ELEMENTS * (_REQUANTISED if step.requantise else 1)
    group = row_group(step)
    return -(-max(1, elements // max(width, 1)) // group) * group


def row_group(step: Compute) -> int:
    """Storage rows that can only be computed and put together."""
    mixed = [operation.update for operation in step.operations if operation.view.transposed]
    return math.lcm(step.target.group, *(update.group for update in mixed if is_mixing(update)))


def block_bytes(tensor: PlannedTensor) -> int:
    """Upper bound of the memory that computing the weight of a tensor takes, factors included."""
    step = tensor.step
    assert isinstance(step, Compute)
    width = step.target.shape[1]
    block = block_height(width, step) * width * 8
    used = {tensor for operation in step.operations for tensor in operation.update.tensors}
    factors = sum(tensor.numel * 8 for tensor in used)
    held = getattr(step.source, "held_nbytes", 0)  # of one that is read with its axes exchanged
    holding = (operation.update for operation in step.operations if is_holding(operation.update))
    return 5 * block + held + factors + sum(update.held_numbers * 8 for update in holding)
