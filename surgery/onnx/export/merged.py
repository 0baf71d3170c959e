# SPDX-License-Identifier: Apache-2.0
"""Merged weights of a graph: the plan of `surgery merge`, of which only what it computes is written, beside the base that stays as it is.

The graph reads changed tensors out of one file and all others out of the base. Everything else about it (which update meets which bytes,
the arithmetic, the proof of every block, the account of every tensor) is the merge's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from surgery.engine.layout import planned_file
from surgery.engine.model_output import plan_merge
from surgery.engine.packing import PAGE, packing_groups, packing_order
from surgery.engine.plan import Account, Compute, Copy, Plan, PlannedTensor, SideFile, check_conservation
from surgery.onnx.graph.weights import GraphTensor
from surgery_formats.binding.bind import Binding
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Component
from surgery_formats.models.families.parameters import model_of
from surgery_formats.models.families.recipe import Model, Projection
from surgery_formats.tensors.unwritten import UnwrittenFile, UnwrittenTensor

__all__ = ["DELTA", "Layout", "Merged", "merged_weights"]

DELTA = "delta.safetensors"
"""Name of the file of changed tensors."""

Layout = Literal["delta", "full"]


@dataclass(frozen=True)
class Merged:
    """What a graph is built from once adapters are merged.

    Attributes:
        plan: What is to be written.
        component: The base with the configuration the merge made true.
        overrides: Tensors to read instead of the base's, by name.
        side_files: Of the output folder, but for an index that the folder does not need.
        model: The recipe; layers that have got a bias add it.
    """

    plan: Plan
    component: Component
    overrides: Mapping[str, GraphTensor]
    side_files: tuple[SideFile, ...]
    model: Model


def merged_weights(binding: Binding, layout: Layout) -> Merged:
    """Plan the weights of a graph with the bound adapters merged.

    Args:
        binding: Adapters and their base, a single model.
        layout: ``delta``: only changed tensors are written; ``full``: all of them, laid out for graphs.

    Raises:
        FitError: see `surgery.engine.model_output.plan_merge`.
    """
    component = binding.checkpoint.main
    if layout == "full" and (grown := [edit.name for edit in binding.edits.values() if not edit.source.sources]):
        raise FitError(
            "the adapter adds a bias where this architecture has none: no checkpoint can hold it, a graph can",
            tensor=grown[0],
            hint="--merge-to delta",
        )
    whole = plan_merge(binding, packed=layout == "full")
    plan = whole if layout == "full" else _delta(binding, whole, component)
    overrides: dict[str, GraphTensor] = {}
    for file in plan.files:
        unwritten = UnwrittenFile(Path(file.name), file.nbytes, file.header)
        overrides |= {
            one.name: UnwrittenTensor(one.name, one.dtype, one.shape, unwritten, one.offset, one.nbytes)
            for one in file.tensors
        }
    for one in whole.tensors:  # a head that was tied and keeps the embedding's values: the same bytes by another name
        if isinstance(one.step, Copy) and one.name not in overrides and one.step.source.name != one.name:
            overrides[one.name] = replace(one.step.source, name=one.name)
    kept = tuple(side for side in whole.side_files if layout == "full" or side.name != component.index_name)
    changed = replace(component, config=_config(component, kept))
    model = model_of(changed.config, frozenset(changed.parameters) | frozenset(overrides))
    return Merged(plan, changed, overrides, kept, _with_biases(model, overrides))


def _with_biases(part: Any, names: Collection[str]) -> Any:
    """`part` of a recipe, every projection without a bias given the one of its name."""
    if isinstance(part, tuple):
        return tuple(_with_biases(one, names) for one in part)
    if not is_dataclass(part) or isinstance(part, type):
        return part
    if isinstance(part, Projection):
        bias = f"{part.weight.removesuffix('weight')}bias"
        return replace(part, bias=bias) if not part.bias and bias in names else part
    return replace(part, **{field.name: _with_biases(getattr(part, field.name), names) for field in fields(part)})


def _config(component: Component, side_files: Collection[SideFile]) -> Mapping[str, object]:
    made = next((side for side in side_files if side.name == "config.json" and side.data), None)
    return json.loads(made.data) if made else component.config


def _delta(binding: Binding, whole: Plan, component: Component) -> Plan:
    """The part of a merge that is computed, and what graphs read together with it."""
    groups = packing_groups(component)
    planned = [one for one in whole.tensors if isinstance(one.step, Compute)]
    if any(file.name == DELTA for file in whole.files):
        raise FitError("the base has a weight file of this name", file=component.folder / DELTA, hint="rename it")
    carried = _torn(planned, groups, component)
    planned += [one for one in whole.tensors if one.name in carried]
    file = planned_file(DELTA, packing_order(planned, groups), alignment=PAGE)
    there = {one.name for one in file.tensors}
    accounts = [
        Account(tensor, "referenced", f"used where it lies in {tensor.file.path.name}")
        for tensor in component.tensors.values()
        if tensor.name not in there
    ]
    known = {account.tensor.name for account in accounts}
    accounts += [account for account in whole.accounts if account.tensor.name not in known]
    digest = hashlib.sha256(f"{whole.id} delta".encode()).hexdigest()
    plan = replace(
        whole,
        verb="export-onnx",
        files=(file,),
        side_files=(),
        accounts=tuple(accounts),
        warnings=binding.warnings,  # a graph carries no other file along, wherever it is written
        id=digest,
    )
    check_conservation(binding, plan)
    return plan


def _torn(planned: Collection[PlannedTensor], groups: Mapping[str, tuple[str, ...]], component: Component) -> set[str]:
    """Unchanged matrices that lie beside changed ones in the base, so that a graph reads them as one: they come along."""
    changed = {one.name for one in planned}
    found: set[str] = set()
    for group in set(groups.values()):
        if not changed & set(group) or changed >= set(group) or any(name not in component.tensors for name in group):
            continue
        stored = [component.tensors[name] for name in group]
        if all(one.file is other.file and one.offset + one.nbytes == other.offset for one, other in pairwise(stored)):
            found |= set(group) - changed
    return found
