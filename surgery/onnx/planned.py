# SPDX-License-Identifier: Apache-2.0
"""Weights that are planned and not yet written, as a checkpoint: graphs that refer to them are built before anything is computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.packing import PAGE, packing_groups, packing_order
from surgery.plan import Compute, Plan, PlannedFile, PlannedTensor
from surgery_formats.checkpoint import Component
from surgery_formats.files.raw import File
from surgery_formats.files.safetensors import layout
from surgery_formats.files.sharded import Shard
from surgery_formats.tensors import StoredTensor

__all__ = ["DELTA", "delta_plan", "planned_component", "with_delta"]

DELTA = "delta.safetensors"
"""Holds what a merge changed, beside the weights of the base, which stay as they are."""


def planned_component(component: Component, plan: Plan, folder: Path) -> Component:
    """The checkpoint that `plan` will write into `folder`."""
    shards = tuple(_shard(file, folder, number) for number, file in enumerate(plan.files))
    return replace(component, folder=folder, shards=shards, index=None, index_name="", config=_config(component, plan))


def with_delta(component: Component, full: Plan, delta: Plan) -> Component:
    """The base's tensors, but those of the delta file where it has them."""
    shards = (*component.shards, _shard(delta.files[0], component.folder, 0))
    return replace(component, shards=shards, config=_config(component, full))


def delta_plan(full: Plan, component: Component) -> Plan:
    """From the plan of a whole merge to that of a file with the tensors that change.

    A tensor that graphs read together with a changed one comes along, so that they still lie side by side.
    """
    groups = packing_groups(component)
    changed = {tensor.name for tensor in full.tensors if isinstance(tensor.step, Compute) or tensor.kind != "copied"}
    wanted = changed | {name for one in changed for name in groups.get(one, ())}
    kept = packing_order([tensor for tensor in full.tensors if tensor.name in wanted], groups)
    header, ranges = layout([(one.name, one.dtype, one.shape) for one in kept], {"format": "pt"}, PAGE)
    placed = tuple(replace(one, offset=ranges[one.name][0]) for one in kept)
    size = max((one.offset + one.nbytes for one in placed), default=len(header))
    return replace(
        full,
        files=(PlannedFile(DELTA, header, size, placed),),
        side_files=(),
        accounts=(),
        id=hashlib.sha256(f"{full.id} delta".encode()).hexdigest(),
    )


def _shard(file: PlannedFile, folder: Path, number: int) -> Shard:
    path = folder / Path(file.name).name
    # No descriptor: it is not there yet. The identity only has to differ from every other's.
    there = File(path, -1, file.nbytes, (-1, number, file.nbytes, 0))
    return Shard(path, "safetensors", tuple(_stored(file.tensors, there)), None, {})


def _stored(tensors: Iterable[PlannedTensor], file: File) -> Iterable[StoredTensor]:
    return (StoredTensor(one.name, one.dtype, one.shape, file, one.offset, one.nbytes) for one in tensors)


def _config(component: Component, plan: Plan) -> dict[str, Any]:
    """config.json as the merge corrects it."""
    found = next((side for side in plan.side_files if side.name == "config.json" and side.data), None)
    return dict(component.config) if found is None else json.loads(found.data)
