# SPDX-License-Identifier: Apache-2.0
"""The plan of a merge: weight files, side files and configuration of the output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from surgery._version import __version__
from surgery.engine.input_checks import check_base_id, float_type
from surgery.engine.inputs import AdaptersLike, CheckpointLike, as_checkpoint, as_weighted
from surgery.engine.layout import WeightLayout, lay_out
from surgery.engine.merge.carried import carried_files
from surgery.engine.merge.output_config import coded_modules, corrected_config, corrected_quantisation_files
from surgery.engine.merge.same_base import with_known_bases
from surgery.engine.plan import Compute, Plan, PlannedTensor, SideFile, check_conservation, is_coded
from surgery.engine.quantised.mixed_config import torn_apart
from surgery.engine.quantised.output import DEQUANTISED, QuantisedOutput
from surgery.engine.selection import Selection, left_out_warning
from surgery_formats.binding.bind import Binding, bind
from surgery_formats.binding.edits import Edit
from surgery_formats.canonical.quantised_base import quantised_base_of
from surgery_formats.collector import collector_paused
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.files.raw import File, open_file
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.identity import fingerprint, shard_fingerprints
from surgery_formats.storage.base import Storage
from surgery_formats.storage.quantised import is_coded as is_quantised
from surgery_formats.tensors.tensor import origin
from surgery_formats.text import listing, show, without_local_paths

if TYPE_CHECKING:
    from surgery.engine.two_bases.as_trained import TrainedValues

__all__ = ["OtherValues", "merge_facts", "plan_merge", "planned_merge"]


class OtherValues(Protocol):
    """Values in the place of the base's: what `surgery.engine.undo.undone` finds."""

    @property
    def weights(self) -> Mapping[tuple[str, str], Storage]:
        """By ``(component, name)``."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """For the manifest."""

    @property
    def files(self) -> tuple[File, ...]:
        """Opened, and only read."""

    @property
    def roots(self) -> tuple[Path, ...]:
        """What the user named."""


@collector_paused()
def planned_merge(
    base: CheckpointLike,
    adapters: AdaptersLike,
    dtype: str,
    shard_size: int | None,
    layout: str,
    quantised: QuantisedOutput = DEQUANTISED,
    reversible: bool = False,
    as_trained: CheckpointLike | None = None,
    without: Sequence[str] = (),
    undone: OtherValues | None = None,
) -> tuple[Binding, Plan]:
    """The binding and the plan of a merge.

    `undone` holds values that the base had before another merge, and that this one begins with.

    Where an adapter says that it was trained on a quantised base and this is another, a few rows of the base are read
    to tell what that costs.

    Raises:
        FitError, InputError: see `surgery.merge`.
    """
    if layout not in ("keep", "packed"):
        raise FitError(f"layout is 'keep' or 'packed', not '{show(layout)}'")
    weighted = as_weighted(adapters)
    if not weighted:
        raise FitError("no adapter was named")
    weighted, left = Selection(without=tuple(without)).chosen(weighted) if without else (weighted, ())
    checkpoint = as_checkpoint(base)
    binding = bind([(entry.adapter, entry.weight) for entry in weighted], checkpoint)
    binding, notes = with_known_bases(binding)
    if left:
        binding = replace(binding, warnings=(*binding.warnings, left_out_warning(left)))
    if undone is None:  # else the values are another model's
        check_base_id(checkpoint, [entry.adapter for entry in weighted])
    quantised.check(checkpoint)
    stored = float_type(dtype, "weights")
    if quantised.way != "dequantize" or quantised.only_touched:
        _check_codes(checkpoint, quantised)
    values = None
    if as_trained is not None:
        from surgery.engine.two_bases.as_trained import trained_values, with_trained_values

        values = trained_values(as_trained, checkpoint)
        binding = with_trained_values(binding, values)
    else:
        binding = replace(binding, warnings=(*binding.warnings, *_other_base(binding)))
    if undone is not None:
        binding = _with_undone(binding, undone)
    planned = binding
    if quantised.way == "residual":
        from surgery.engine.quantised.residual_choice import without_kept  # numpy

        planned = without_kept(binding, quantised)
    plan = plan_merge(
        planned,
        dtype=stored,
        shard_size=shard_size,
        packed=layout == "packed",
        quantised=quantised,
        reversible=reversible,
        values=values,
        left_out=left,
        undone=undone,
    )
    return binding, replace(plan, notes=notes)


def _with_undone(binding: Binding, undone: OtherValues) -> Binding:
    """The binding to the values before a merge: under every update, and where there is none any more."""
    edits = dict(binding.edits)
    for (component, name), storage in undone.weights.items():
        edit = edits.get((component, name))
        if edit is None:
            edits[component, name] = Edit(component, name, storage, (), why="the merged update was taken back")
        elif edit.replaced is None and not edit.added:
            edits[component, name] = replace(edit, source=storage)
    return replace(binding, edits=edits)


def _check_codes(checkpoint: Checkpoint, quantised: QuantisedOutput) -> None:
    """Refuse to keep codes where there are none."""
    if not (checkpoint.is_quantised or any(component.unread for component in checkpoint.components.values())):
        raise FitError(
            "nothing of it is quantised, so that there are no codes to keep",
            file=checkpoint.path,
            hint="leave out " + ("`only_touched=True`" if quantised.only_touched else f'`quantized="{quantised.way}"`'),
        )


def _other_base(binding: Binding) -> tuple[str, ...]:
    """Warnings for adapters that were trained on a quantised base, where the base of this merge is not."""
    quantised = [(number, said) for number, (a, _) in enumerate(binding.adapters) if (said := quantised_base_of(a))]
    if not quantised or binding.checkpoint.is_quantised:
        return ()
    from surgery.engine.two_bases.choice import cost_of_other_base  # numpy

    return tuple(cost_of_other_base(binding, number, said) for number, said in quantised)


def plan_merge(
    binding: Binding,
    *,
    dtype: DType | None = None,
    shard_size: int | None = None,
    packed: bool = False,
    quantised: QuantisedOutput = DEQUANTISED,
    reversible: bool = False,
    values: TrainedValues | None = None,
    left_out: Sequence[str] = (),
    undone: OtherValues | None = None,
) -> Plan:
    """The plan of a merge; reads headers only, apart from the little that decides whether two tied tensors agree.

    Raises:
        FitError: the base would lose a tensor.
    """
    checkpoint = binding.checkpoint
    layouts: dict[str, WeightLayout] = {}
    for name, component in checkpoint.components.items():
        edits = {edit.name: edit for (owner, _), edit in binding.edits.items() if owner == name}
        layouts[name] = lay_out(component, edits, dtype, shard_size, binding.untied, packed, quantised)
    side_files = [SideFile(layout.index_name, data=layout.index) for layout in layouts.values() if layout.index_name]
    grown = {edit.replaced.adapter for edit in binding.edits.values() if edit.replaced and _grew(edit, checkpoint)}
    carried = carried_files(binding, grown)
    side_files += carried.files
    files = tuple(file for layout in layouts.values() for file in layout.files)
    outputs = [tensor for file in files for tensor in file.tensors]
    side_files = corrected_quantisation_files(binding, side_files, outputs)
    side_files += corrected_config(binding, outputs, dtype, rewritten=packed)
    inputs, roots = _read(binding, quantised, values, undone)
    facts = merge_facts(binding)
    if left_out:
        facts["left_out"] = list(left_out)
    if carried.facts:
        facts["carried"] = carried.facts
    facts |= _facts_of_weights(binding, outputs, quantised, values, undone)
    options = {"dtype": dtype.label if dtype else "keep", "shard_size": shard_size, "packed": packed}
    options |= quantised.options | ({"reversible": True} if reversible else {})
    plan = Plan(
        verb="merge",
        files=files,
        side_files=tuple(side_files),
        accounts=tuple(account for layout in layouts.values() for account in layout.accounts),
        ignored=binding.ignored,
        inputs=tuple(inputs),
        roots=tuple(roots),
        id=hashlib.sha256(json.dumps([__version__, "merge", facts, options], sort_keys=True).encode()).hexdigest(),
        facts=facts,
        in_lora=len({origin(t) for t in binding.settled}) if quantised.way == "residual" else 0,
        warnings=binding.warnings + carried.warnings + _left_behind(checkpoint) + _torn(checkpoint, outputs),
    )
    check_conservation(binding, plan)
    return plan


def _read(
    binding: Binding, quantised: QuantisedOutput, values: TrainedValues | None, undone: OtherValues | None
) -> tuple[list[File], list[Path]]:
    """Every file that is read, and what the user named of them."""
    checkpoint = binding.checkpoint
    inputs = [shard.file for component in checkpoint.components.values() for shard in component.shards]
    inputs += list({file.identity: file for adapter, _ in binding.adapters for file in adapter.files}.values())
    roots = [checkpoint.path, *(adapter.path for adapter, _ in binding.adapters)]
    if values is not None:
        inputs += values.files
        roots += [values.root] if values.root is not None else []
    if undone is not None:
        inputs += undone.files
        roots += undone.roots
    if quantised.calibration is not None:
        inputs += quantised.calibration.files
        roots.append(quantised.calibration.path)
    return inputs, roots


def _facts_of_weights(
    binding: Binding,
    outputs: Sequence[PlannedTensor],
    quantised: QuantisedOutput,
    values: TrainedValues | None,
    undone: OtherValues | None,
) -> dict[str, Any]:
    """How weights differ from base and adapters: what who takes the merge back has to know."""
    facts: dict[str, Any] = {}
    if quantised.way == "residual":  # most of it is not in the weights
        facts["quantized"] = quantised.way
    wider = {key for key, edit in binding.edits.items() if edit.operations and _grew(edit, binding.checkpoint)}
    if wider:  # the base had fewer columns
        facts["grown"] = sorted({t.weight_label for t in outputs if (t.component, t.weight) in wider})
    if undone is not None:
        facts["replaced"] = dict(undone.facts)
    if dequantised := _dequantised(outputs, values):
        facts["dequantised"] = dequantised
    if values is not None:
        facts["as_trained"] = values.facts
    return facts


def _grew(edit: Edit, checkpoint: Checkpoint) -> bool:
    base = checkpoint.components[edit.component].parameters.get(edit.name)
    return not edit.added and base is not None and edit.source.sizes != base.sizes


def merge_facts(binding: Binding) -> dict[str, Any]:
    """Facts that identify the inputs by content, not by path."""
    made = {name: component.made for name, component in binding.checkpoint.components.items() if component.made}
    return ({"made": made} if made else {}) | {
        "base": shard_fingerprints(binding.checkpoint),
        "side_files": {name: fingerprint(open_file(path)) for name, path in binding.checkpoint.side_files},
        "configs": {
            name: without_local_paths(component.config) for name, component in binding.checkpoint.components.items()
        },
        "adapters": [
            {
                "format": adapter.format,
                "kind": adapter.kind_name,
                "weight": weight,
                "config": without_local_paths(adapter.config),
                "files": sorted({fingerprint(file) for file in adapter.files}),
                **({"made": adapter.made} if adapter.made else {}),
            }
            for adapter, weight in binding.adapters
        ],
    }


def _dequantised(outputs: Sequence[PlannedTensor], values: TrainedValues | None) -> dict[str, list[str]]:
    """By format: the weights whose values were those of codes, and are written as elements."""
    by_rule = values.weights if values is not None and values.root is None else {}
    kinds: dict[str, list[str]] = {}
    for tensor in outputs:
        if isinstance(tensor.step, Compute) and not is_coded(tensor.step):
            source = tensor.step.source
            if is_quantised(source) or source is by_rule.get((tensor.component, tensor.weight)):
                kinds.setdefault(source.kind, []).append(tensor.weight_label)
    return kinds


def _left_behind(checkpoint: Checkpoint) -> tuple[str, ...]:
    if not checkpoint.left_behind:
        return ()
    return (f"not carried (other weights, deeper folders, links out of the folder): {listing(checkpoint.left_behind)}",)


def _torn(checkpoint: Checkpoint, outputs: Sequence[PlannedTensor]) -> tuple[str, ...]:
    found = [
        name for component in checkpoint.components.values() for name in torn_apart(*coded_modules(component, outputs))
    ]
    if not found:
        return ()
    return (f"vLLM and SGLang join these with others that are still quantised, and refuse that: {listing(found)}",)
