# SPDX-License-Identifier: Apache-2.0
"""Merged weights of a graph: the plan of `surgery merge`, reduced to the tensors that it computes, beside the base.

The graph reads changed tensors from one file and all others from the base. Everything else (matching updates to bytes,
the arithmetic, the proof of every block, the account of every tensor) is that of merge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from surgery.engine.layout import planned_file
from surgery.engine.merge.merge_plan import plan_merge
from surgery.engine.packing import PAGE, packing_groups, packing_order
from surgery.engine.plan import Account, Compute, Copy, Plan, PlannedTensor, SideFile, check_conservation
from surgery.onnx.graph.coded import GraphCodes
from surgery.onnx.graph.weights import GraphTensor
from surgery_formats.binding.bind import Binding
from surgery_formats.errors import FitError
from surgery_formats.models.component import Component
from surgery_formats.models.families.parameters import model_of
from surgery_formats.models.families.recipe import Model, Projection
from surgery_formats.tensors.unwritten import UnwrittenFile, UnwrittenTensor

__all__ = ["DELTA", "Layout", "MergedWeights", "merged_weights", "with_biases", "written_config"]

DELTA = "delta.safetensors"
"""File name of the changed tensors."""

Layout = Literal["delta", "full"]


@dataclass(frozen=True)
class MergedWeights:
    """The weights from which a graph is built after merging adapters.

    Attributes:
        plan: The plan of the files to write.
        component: The base with the merged configuration.
        overrides: Tensors that replace the base's, by name.
        side_files: Side files of the output folder, except an index that it does not need.
        model: The recipe, with the biases that the merge added.
        coded: Weights stored as codes in blocks, by name.
        across: Whether linear maps are written ``(in, out)``.
    """

    plan: Plan
    component: Component
    overrides: Mapping[str, GraphTensor]
    side_files: tuple[SideFile, ...]
    model: Model
    coded: Mapping[str, GraphCodes] = field(default_factory=dict)
    across: bool = False


def merged_weights(binding: Binding, layout: Layout, task: str = "") -> MergedWeights:
    """Plan the weights of a graph with merged adapters.

    Args:
        binding: Adapters bound to their base, a single model.
        layout: ``delta``: only changed tensors are written; ``full``: all tensors, laid out for graphs.
        task: What the graph is for; by default what the merged model is saved for.

    Raises:
        FitError: see `surgery.engine.merge.merge_plan.plan_merge`.
    """
    component = binding.checkpoint.main
    if layout == "full" and (new_biases := [edit.name for edit in binding.edits.values() if not edit.source.sources]):
        raise FitError(
            "the adapter adds a bias that this architecture lacks: a graph can hold it, but not a checkpoint",
            tensor=new_biases[0],
            hint='`merge_to="delta"`',
        )
    merge_plan = plan_merge(binding, packed=layout == "full")
    plan = merge_plan if layout == "full" else _delta(binding, merge_plan, component)
    overrides: dict[str, GraphTensor] = {}
    for file in plan.files:
        unwritten = UnwrittenFile(Path(file.name), file.nbytes, file.header)
        overrides |= {
            tensor.name: UnwrittenTensor(
                tensor.name, tensor.dtype, tensor.shape, unwritten, tensor.offset, tensor.nbytes
            )
            for tensor in file.tensors
        }
    for tensor in merge_plan.tensors:  # a formerly tied head with the embedding's values: the same bytes, another name
        if isinstance(tensor.step, Copy) and tensor.name not in overrides and tensor.step.source.name != tensor.name:
            overrides[tensor.name] = replace(tensor.step.source, name=tensor.name)
    side_files = tuple(side for side in merge_plan.side_files if layout == "full" or side.name != component.index_name)
    changed = component.with_config(written_config(component, side_files))
    model = model_of(changed.config, frozenset(changed.parameters) | frozenset(overrides), task)
    return MergedWeights(plan, changed, overrides, side_files, with_biases(model, overrides))


def with_biases(part: Any, names: Collection[str]) -> Any:
    """Add biases in `names` to the projections in a recipe's `part` that lack them."""
    if isinstance(part, tuple):
        return tuple(with_biases(item, names) for item in part)
    if not is_dataclass(part) or isinstance(part, type):
        return part
    if isinstance(part, Projection):
        bias = f"{part.weight.removesuffix('weight')}bias"
        return replace(part, bias=bias) if not part.bias and bias in names else part
    return replace(part, **{field.name: with_biases(getattr(part, field.name), names) for field in fields(part)})


def written_config(component: Component, side_files: Collection[SideFile]) -> Mapping[str, object]:
    """The configuration among the side files, else the component's own."""
    written = next((side for side in side_files if side.name == "config.json" and side.data), None)
    return json.loads(written.data) if written else component.config


def _delta(binding: Binding, merge_plan: Plan, component: Component) -> Plan:
    """The computed part of a merge, and the tensors that graphs read together with it."""
    groups = packing_groups(component)
    planned = [tensor for tensor in merge_plan.tensors if isinstance(tensor.step, Compute)]
    if any(file.name == DELTA for file in merge_plan.files):
        raise FitError("the base has a weight file with this name", file=component.folder / DELTA, hint="rename it")
    carried = _torn(planned, groups, component)
    planned += [tensor for tensor in merge_plan.tensors if tensor.name in carried]
    file = planned_file(DELTA, packing_order(planned, groups), alignment=PAGE)
    stored = {tensor.name for tensor in file.tensors}
    sources = [account for account in merge_plan.accounts if account.outcome == "source"]  # codes, scales
    kept = stored | {account.tensor.name for account in sources}
    accounts = [
        Account(tensor, "referenced", f"used where it lies in {tensor.file.path.name}")
        for tensor in component.tensors.values()
        if tensor.name not in kept
    ]
    accounted = {account.tensor.name for account in accounts}
    accounts += [account for account in merge_plan.accounts if account.tensor.name not in accounted]
    digest = hashlib.sha256(f"{merge_plan.id} delta".encode()).hexdigest()
    plan = replace(
        merge_plan,
        verb="export-onnx",
        files=(file,),
        side_files=(),
        accounts=tuple(accounts),
        warnings=binding.warnings,  # warnings about other files do not apply: a graph comes without them
        id=digest,
    )
    check_conservation(binding, plan)
    return plan


def _torn(planned: Collection[PlannedTensor], groups: Mapping[str, tuple[str, ...]], component: Component) -> set[str]:
    """Unchanged matrices adjacent to changed ones in the base: graphs read them as one, so they are written too."""
    changed = {tensor.name for tensor in planned}
    torn: set[str] = set()
    for group in set(groups.values()):
        if not changed & set(group) or changed >= set(group) or any(name not in component.tensors for name in group):
            continue
        stored = [component.tensors[name] for name in group]
        if all(a.file is b.file and a.offset + a.nbytes == b.offset for a, b in pairwise(stored)):
            torn |= set(group) - changed
    return torn
