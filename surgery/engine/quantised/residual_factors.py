# SPDX-License-Identifier: Apache-2.0
"""The LoRA of one weight beside its codes: the update's own factors, or those of what the codes that were written lack."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy

from surgery.engine.blocks import block_height
from surgery.engine.plan import Compute
from surgery.engine.quantised.output import QuantisedOutput
from surgery.engine.quantised.residual_choice import base_of, goal_of, is_held, leading
from surgery_formats.arrays import Array, energy
from surgery_formats.binding.bind import Binding
from surgery_formats.binding.edits import Edit, prepared
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.storage.base import Storage, read_values
from surgery_formats.tensors.apply import apply_chain
from surgery_formats.tensors.computed import computed
from surgery_formats.tensors.views import positions
from surgery_formats.updates import Factor, LoRA, Update

__all__ = ["largest_update", "update_left"]


def largest_update(binding: Binding, edit: Edit, options: QuantisedOutput) -> Update:
    """An update of the sizes that the LoRA of a weight may have."""
    if edit.replaced is not None:
        return edit.replaced.update
    goal, weight = goal_of(edit, options), base_of(binding, edit)
    assert weight is not None
    if is_held(edit, goal):
        return _sum(edit, weight)
    rows, columns = weight.shape[::-1] if weight.transposed else weight.shape
    rank = min(goal.rank, rows, columns)
    zero = numpy.float32(0)
    return _lora(edit.name, numpy.broadcast_to(zero, (rows, rank)), numpy.broadcast_to(zero, (rank, columns)))


def update_left(
    binding: Binding, edit: Edit, merged: Checkpoint, options: QuantisedOutput, *, kept: bool
) -> tuple[Update | None, float]:
    """What the LoRA's folder has for a weight, and how far base' with it will be off."""
    if edit.replaced is not None:
        return edit.replaced.update, 0.0
    goal, weight = goal_of(edit, options), base_of(binding, edit)
    assert weight is not None
    if kept and is_held(edit, goal):
        return _sum(edit, weight), 0.0
    update, left = _missing(edit, weight, merged.components[edit.component].parameters[edit.name].storage)
    found = leading(left, goal, update)
    if not len(found.S):
        return None, found.residual
    B, A = (numpy.ascontiguousarray(factor) for factor in found.factors())
    return _lora(edit.name, B, A), found.residual


def _missing(edit: Edit, weight: Storage, written: Storage) -> tuple[float, Array]:
    """Norm of the update, and what the written weight lacks of it: ``(out, in)``, float32."""
    step = Compute(edit.source, edit.operations, weight)
    height, rows = block_height(weight.shape[1], step), weight.shape[0]
    chain = prepared(edit.operations, edit.source, DType.F32, height)
    left, size = numpy.empty(weight.shape, numpy.float32), 0.0
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        block = read_values(edit.source, start, stop)
        before = block.copy()
        apply_chain(chain, block, start, stop)
        size += energy(block - before)
        left[start:stop] = block - read_values(written, start, stop)
    return math.sqrt(size), left.T if weight.transposed else left


def _sum(edit: Edit, weight: Storage) -> LoRA:
    """All updates of a weight as one LoRA of it: its own factors if it is one, and all of the weight is meant."""
    loras = [lora for operation in edit.operations if (lora := operation.update.low_rank()) is not None]
    whole = tuple(operation.view.shape for operation in edit.operations)
    shape = weight.shape[::-1] if weight.transposed else weight.shape
    if len(loras) == 1 and whole == (shape,) and edit.operations[0].view.transposed == weight.transposed:
        return loras[0]
    tensors = [tensor for lora in loras for tensor in lora.tensors]
    rank, name = sum(lora.rank for lora in loras), edit.name
    A = computed(f"{name}.A", (rank, shape[1]), tensors, partial(_side, edit, weight, shape, 1))
    B = computed(f"{name}.B", (shape[0], rank), tensors, partial(_side, edit, weight, shape, 0))
    return LoRA(Factor.of(A), Factor.of(B), 1.0, float(rank))


def _side(edit: Edit, weight: Storage, shape: tuple[int, int], axis: int) -> Array:
    """The factors of all updates side by side, each where its view lies: B ``(out, r)``, or A ``(r, in)``."""
    sides = []
    for operation in edit.operations:
        lora, view = operation.update.low_rank(), operation.view
        assert lora is not None
        if view.transposed != weight.transposed:  # the weight of the module is the transpose
            lora, view = lora.transpose(), replace(view, rows=view.cols, cols=view.rows)
            view = replace(view, row_origin=operation.view.col_origin, col_origin=operation.view.row_origin)
        factor = lora.A.load(DType.F32).T if axis else lora.B.load(DType.F32) * lora.scale
        index, origin = (view.cols, view.col_origin) if axis else (view.rows, view.row_origin)
        side = numpy.zeros((shape[axis], lora.rank), numpy.float32)
        side[list(index)] = positions(factor, 0, range(origin, origin + len(index)))
        sides.append(side)
    joined = numpy.concatenate(sides, axis=1)
    return joined.T if axis else joined


def _lora(name: str, B: Array, A: Array) -> LoRA:
    factors = {"A": A, "B": B}
    tensors = {key: computed(f"{name}.{key}", each.shape, (), partial(_held, each)) for key, each in factors.items()}
    return LoRA(Factor.of(tensors["A"]), Factor.of(tensors["B"]), 1.0, float(len(A)))


def _held(values: Array) -> Array:
    return values
