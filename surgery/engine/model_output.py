# SPDX-License-Identifier: Apache-2.0
"""A model as an output: the plan of its weight files and side files, and the judgement of what was computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery._version import __version__
from surgery.engine.checks import check_base_id
from surgery.engine.layout import WeightLayout, lay_out
from surgery.engine.ledger import Ledger
from surgery.engine.output_config import corrected_config
from surgery.engine.plan import Compute, Plan, PlannedTensor, SideFile, check_conservation
from surgery_formats.binding.bind import Binding
from surgery_formats.binding.edits import Edit
from surgery_formats.binding.tied_edits import same_values
from surgery_formats.dtypes import DType
from surgery_formats.errors import NothingChangedError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.identity import fingerprint
from surgery_formats.text import listing

__all__ = ["LOW_SURVIVAL", "judge", "plan_merge"]

LOW_SURVIVAL = 0.9
"""Below this share of the update surviving its storage type, a merge warns."""


def plan_merge(
    binding: Binding, *, dtype: DType | None = None, shard_size: int | None = None, packed: bool = False
) -> Plan:
    """The plan of a merge; reads headers only, apart from the little that decides whether two tied tensors agree.

    Raises:
        FitError: the base would lose a tensor, or the adapter was made for another base.
    """
    checkpoint = binding.checkpoint
    check_base_id(checkpoint, [adapter for adapter, _ in binding.adapters])
    layouts: dict[str, WeightLayout] = {}
    for name, component in checkpoint.components.items():
        edits = {edit.name: edit for (owner, _), edit in binding.edits.items() if owner == name}
        layouts[name] = lay_out(component, edits, dtype, shard_size, binding.untied, packed)
    side_files = [SideFile(layout.index_name, data=layout.index) for layout in layouts.values() if layout.index_name]
    side_files += _carried(binding)
    files = tuple(file for layout in layouts.values() for file in layout.files)
    side_files += corrected_config(binding, [tensor for file in files for tensor in file.tensors], dtype)
    inputs = [shard.file for component in checkpoint.components.values() for shard in component.shards]
    inputs += list({file.identity: file for adapter, _ in binding.adapters for file in adapter.files}.values())
    facts = _facts(binding)
    options = {"dtype": dtype.label if dtype else "keep", "shard_size": shard_size, "packed": packed}
    plan = Plan(
        verb="merge",
        files=files,
        side_files=tuple(side_files),
        accounts=tuple(account for layout in layouts.values() for account in layout.accounts),
        ignored=binding.ignored,
        inputs=tuple(inputs),
        roots=(checkpoint.path, *(adapter.path for adapter, _ in binding.adapters)),
        id=hashlib.sha256(json.dumps([__version__, "merge", facts, options], sort_keys=True).encode()).hexdigest(),
        facts=facts,
        warnings=binding.warnings + _left_behind(checkpoint),
    )
    check_conservation(binding, plan)
    return plan


def _carried(binding: Binding) -> list[SideFile]:
    """The base's side files; the adapter's tokenizer where the vocabulary grew."""
    side_files = {name: SideFile(name, source=path) for name, path in binding.checkpoint.side_files}
    grown = [
        edit for edit in binding.edits.values() if edit.replaced and not edit.added and _grew(edit, binding.checkpoint)
    ]
    for edit in grown:
        assert edit.replaced is not None
        for path in binding.adapters[edit.replaced.adapter][0].side_files:
            side_files[path.name] = SideFile(path.name, source=path)
    return [side_files[name] for name in sorted(side_files)]


def _grew(edit: Edit, checkpoint: Checkpoint) -> bool:
    base = checkpoint.components[edit.component].parameters.get(edit.name)
    return base is not None and edit.source.sizes != base.sizes


def _facts(binding: Binding) -> dict[str, Any]:
    """What names the inputs by content, not by place."""
    return {
        "base": {
            (f"{component.name}/" if component.name else "") + shard.path.name: fingerprint(shard.file)
            for component in binding.checkpoint.components.values()
            for shard in component.shards
        },
        "side_files": {name: _small_digest(path) for name, path in binding.checkpoint.side_files},
        "configs": {name: component.config for name, component in binding.checkpoint.components.items()},
        "adapters": [
            {
                "format": adapter.format,
                "kind": adapter.kind,
                "weight": weight,
                "config": adapter.config,
                "files": sorted({fingerprint(file) for file in adapter.files}),
            }
            for adapter, weight in binding.adapters
        ],
    }


def _small_digest(path: Path) -> str:
    from surgery_formats.files.raw import open_file

    return fingerprint(open_file(path))


def _left_behind(checkpoint: Checkpoint) -> tuple[str, ...]:
    if not checkpoint.left_behind:
        return ()
    return (f"not carried (other weights, deeper folders, links out of the folder): {listing(checkpoint.left_behind)}",)


def _differs(tensor: PlannedTensor, checkpoint: Checkpoint) -> bool:
    """Whether an added tensor is trained, or a replaced one holds other values than the base's."""
    if tensor.outcome == "added":
        files = {shard.file for component in checkpoint.components.values() for shard in component.shards}
        return all(source.file not in files for source in tensor.step.sources)
    base = checkpoint.components[tensor.component].parameters.get(tensor.weight)
    if tensor.outcome != "replaced" or not isinstance(tensor.step, Compute):
        return False
    return base is None or not same_values(base.storage, tensor.step.source)


def judge(ledger: Ledger, checkpoint: Checkpoint, weights: Sequence[float]) -> list[str]:
    """Refuse an output equal to the base; warn of updates lost to rounding.

    Raises:
        NothingChangedError: no stored value differs from the base's.
    """
    moved = any(measured.changed for measured in ledger.measured.values())
    if not moved and not any(_differs(tensor, checkpoint) for tensor in ledger.plan.weights):
        if all(weight == 0 for weight in weights):
            raise NothingChangedError("every adapter has the weight 0", hint="weights are written ADAPTER=0.7")
        raise NothingChangedError(
            "no weight of the base would change",
            hint="the adapter is all zeros, or its update is smaller than the stored type can hold",
        )
    warnings = []
    if ledger.survival < LOW_SURVIVAL:
        warnings.append(
            f"only {ledger.survival:.0%} of the update survives in the stored type; --dtype fp32 keeps it all, "
            "or serve the adapter unmerged"
        )
    if unmoved := ledger.unmoved():
        warnings.append(f"{len(unmoved)} updated tensors did not change: {listing(unmoved)}")
    return warnings
