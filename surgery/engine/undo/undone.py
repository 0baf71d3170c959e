# SPDX-License-Identifier: Apache-2.0
"""A merged model's weights with its adapters taken back, as values that are read and never written.

A merge of others takes them in the place of the base's, so that one adapter replaces another in one pass. They are
rounded to the type that they are stored in, as an unmerge writes them: that is what makes most of them the base's bit for bit,
and the result the same as that of the two commands.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from surgery.engine.jobs import ComputeWeight
from surgery.engine.plan import Compute, Plan, PlannedTensor
from surgery.engine.undo.belongs import recorded_base
from surgery.engine.undo.estimate import estimation
from surgery.engine.undo.record import unmerge_facts
from surgery.engine.undo.restore import restoration
from surgery.engine.undo.sidecar import open_sidecar
from surgery_formats.arrays import Array
from surgery_formats.binding.bind import bind
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError
from surgery_formats.files.raw import File
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.storage.base import Storage, is_stacked
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.computed import ComputedTensor

__all__ = ["UndoneValues", "undone_values"]

_HELD = threading.local()
"""The weight that a thread reads."""
_TWO = "take it back with `surgery.unmerge`, and merge into what comes out"


@dataclass(frozen=True)
class UndoneValues:
    """Weights before a merge.

    Attributes:
        weights: By ``(component, name)``: those that the adapters had changed.
        facts: For the manifest: what was taken back, and from what it is known.
        files: Opened, and only read.
        roots: What the user named.
        exact: Whether they are the base's bit for bit: with what a reversible merge kept.
    """

    weights: Mapping[tuple[str, str], Storage]
    facts: Mapping[str, Any]
    files: tuple[File, ...]
    roots: tuple[Path, ...]
    exact: bool


def undone_values(merged: Checkpoint, adapters: Sequence[tuple[Adapter, float]], kept: Path | None) -> UndoneValues:
    """The values before `adapters` were merged.

    Args:
        merged: The model.
        adapters: All that were merged, in their order and with their weights.
        kept: What the merge kept of the base; None without it.

    Raises:
        FitError: as `restoration` and `estimation`; or the base had other tensors, or weights that are stored as codes.
    """
    if kept is not None:
        restored = restoration(merged, adapters, open_sidecar(kept))
        weights = _weights(merged, restored.plan, restored.compute)
        known: dict[str, Any] = {"base": restored.base_id}
        files = [restored.plan.inputs[-1]]  # what was kept
    else:
        recorded = recorded_base(merged.path, adapters) if merged.path.is_dir() else None
        estimated = estimation(bind(adapters, merged), adapters, recorded)
        weights, files = _weights(merged, estimated.plan, estimated.compute), []
        known = {"estimate": estimated.evidence.source}
    facts = {"adapters": unmerge_facts(adapters, merged)["adapters"], **known}
    files += {file.identity: file for adapter, _ in adapters for file in adapter.files}.values()
    return UndoneValues(weights, facts, tuple(files), tuple(adapter.path for adapter, _ in adapters), kept is not None)


def _weights(merged: Checkpoint, plan: Plan, compute: ComputeWeight) -> dict[tuple[str, str], Storage]:
    stored = {
        (name, tensor.name): (tensor.dtype, tensor.shape)
        for name, component in merged.components.items()
        for tensor in component.tensors.values()
    }
    planned = {(tensor.component, tensor.name): (tensor.dtype, tensor.shape) for tensor in plan.tensors}
    if planned != stored:
        raise FitError("its base had other tensors, or another type", file=merged.path, hint=_TWO)
    weights: dict[tuple[str, str], Storage] = {}
    for tensor in plan.computed():
        before = merged.components[tensor.component].parameters[tensor.weight].storage
        if before.elements is None or tensor.name != tensor.weight:
            raise FitError("is stored as codes", file=merged.path, tensor=tensor.weight, hint=_TWO)
        assert isinstance(tensor.step, Compute)
        make = partial(_values, tensor, tensor.step, compute)
        # No sources: those of the merge, which would be copied, hold other values.
        values = ComputedTensor(tensor.name, tensor.dtype, tensor.shape, (), make)
        weights[tensor.component, tensor.weight] = Plain.of(values, stacked=is_stacked(before))
    return weights


def _values(tensor: PlannedTensor, step: Compute, compute: ComputeWeight) -> Array:
    """All of a weight; a thread that reads it in blocks works it out once."""
    import numpy

    if getattr(_HELD, "tensor", None) is not tensor:
        _HELD.tensor = _HELD.values = None  # room, before the next one is there
        raw = bytearray(tensor.nbytes)

        def write(part: int, offset: int, data: memoryview) -> None:
            raw[offset : offset + len(data)] = data

        compute(tensor.weight_label, step, write, lambda: False, "cpu")
        _HELD.values = numpy.ndarray(tensor.shape, tensor.dtype.numpy, raw)
        _HELD.tensor = tensor
    values: Array = _HELD.values
    return values
