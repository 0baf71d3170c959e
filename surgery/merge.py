# SPDX-License-Identifier: Apache-2.0
"""Merge: the base with everything the adapters trained folded into its weights, at the cost of copying the file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import surgery.card as card
from surgery import __version__
from surgery.config import corrected_config
from surgery.execute import Run, execute
from surgery.layout import Laid, lay_out
from surgery.ledger import Ledger
from surgery.plan import Plan, PlannedTensor, SideFile, check_conservation
from surgery.progress import Callback
from surgery_formats.adapter import Adapter
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.binding import Binding, bind
from surgery_formats.checkpoint import Checkpoint, open_checkpoint
from surgery_formats.dtypes import DType
from surgery_formats.edits import Edit
from surgery_formats.errors import FitError, NothingChangedError
from surgery_formats.identity import content_id, fingerprint
from surgery_formats.text import listing, show
from surgery_formats.ties import same_values

__all__ = ["MergeResult", "check_base_id", "judge", "merge", "plan_merge"]

LOW_SURVIVAL = 0.9
"""Below this share of the update surviving its storage type, a merge warns."""

Weighted = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]


@dataclass(frozen=True)
class MergeResult:
    """What a merge did, or (dry run) would do.

    Attributes:
        output: The folder; None for a dry run.
        ledger: Every tensor, with what was measured.
        warnings: What the user should know.
    """

    output: Path | None
    ledger: Ledger
    warnings: tuple[str, ...]


def merge(
    base: str | os.PathLike[str],
    adapters: Weighted | Sequence[Weighted],
    *,
    output: str | os.PathLike[str] | None = None,
    dtype: str = "keep",
    device: str = "cpu",
    workers: int | None = None,
    memory_limit: int | None = None,
    shard_size: int | None = None,
    layout: str = "keep",
    verify: str = "fast",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> MergeResult:
    """Merge adapters into a base and write the result as a folder of its own.

    Args:
        base: Weight file, Hugging Face folder, or diffusers pipeline folder.
        adapters: One or several, each a path or ``(path, weight)``; applied in this order.
        output: Folder to make. Its parent must exist.
        dtype: ``keep`` (each tensor its own), or a type for every floating-point tensor (``bf16``, ``fp16``, ``fp32``).
        device: Where arithmetic runs (``cpu``, ``cuda``, ``cuda:1``).
        workers: Computing threads; None is one per core, at most eight. Never changes the result.
        memory_limit: Bytes the computed tensors may take together.
        shard_size: Most bytes per weight file; None keeps the base's shards.
        layout: ``keep`` the base's order of tensors; ``packed`` puts those that graphs read together side by side, see `surgery.packing`.
        verify: ``fast``, or ``full`` to compare copied ranges byte by byte too.
        overwrite: Replace an existing output, atomically.
        dry_run: Plan only.
        progress: Called with every step.

    Returns:
        The ledger of every tensor.

    Raises:
        InputError: base or adapter cannot be read.
        FitError: they do not fit, a tensor has no use, a value is NaN or Inf.
        NothingChangedError: the output would be the base.
        OutputExistsError, ResourceError, ProofError: see `surgery.execute.execute`.
    """
    if verify not in ("fast", "full"):
        raise FitError(f"verify is 'fast' or 'full', not '{show(verify)}'")
    if any(
        value is not None and (not isinstance(value, int) or value < 1) for value in (workers, shard_size, memory_limit)
    ):
        raise FitError("workers, shard_size and memory_limit are whole numbers of at least 1")
    if layout not in ("keep", "packed"):
        raise FitError(f"layout is 'keep' or 'packed', not '{show(layout)}'")
    found = bind(_read(adapters), open_checkpoint(base))
    plan = plan_merge(found, dtype=_float_type(dtype), shard_size=shard_size, packed=layout == "packed")
    if dry_run:
        return MergeResult(None, Ledger(plan), plan.warnings)
    if output is None:
        raise FitError("no output was named")
    run = Run(workers, memory_limit, device, verify == "full", overwrite, progress)
    warnings: list[str] = list(plan.warnings)

    def finish(ledger: Ledger) -> Mapping[str, bytes]:
        warnings.extend(judge(ledger, found.checkpoint, [weight for _, weight in found.adapters]))
        return {"README.md": card.merge_card(found, ledger)}

    ledger = execute(plan, output, run, finish)
    return MergeResult(Path(output), ledger, tuple(warnings))


def _float_type(name: str) -> DType | None:
    """The stored type of a name; None for ``keep``."""
    if name == "keep":
        return None
    try:
        found = DType.parse(name)
    except ValueError as error:
        raise FitError(f"no type '{show(name)}'", hint="keep, bf16, fp16, fp32 or fp64") from error
    if not found.is_float:
        raise FitError(
            f"weights cannot be stored as {found.label} without scales", hint="keep, bf16, fp16, fp32 or fp64"
        )
    return found


def _read(adapters: Weighted | Sequence[Weighted]) -> list[tuple[Adapter, float]]:
    if isinstance(adapters, str | os.PathLike) or (
        isinstance(adapters, tuple) and len(adapters) == 2 and isinstance(adapters[1], float | int)
    ):
        adapters = [adapters]
    read = []
    for one in adapters:
        path, weight = one if isinstance(one, tuple) else (one, 1.0)
        if not math.isfinite(weight):
            raise FitError(f"the weight {weight} is not a number", file=path)
        read.append((read_adapter(path), float(weight)))
    if not read:
        raise FitError("no adapter was named")
    return read


def plan_merge(
    binding: Binding, *, dtype: DType | None = None, shard_size: int | None = None, packed: bool = False
) -> Plan:
    """The plan of a merge; reads headers only, apart from the little that decides whether two tied tensors agree.

    Raises:
        FitError: the base would lose a tensor, or the adapter was made for another base.
    """
    checkpoint = binding.checkpoint
    check_base_id(checkpoint, [adapter for adapter, _ in binding.adapters])
    laid: dict[str, Laid] = {}
    for name, component in checkpoint.components.items():
        edits = {edit.name: edit for (owner, _), edit in binding.edits.items() if owner == name}
        laid[name] = lay_out(component, edits, dtype, shard_size, binding.untied, packed)
    side_files = [SideFile(one.index_name, data=one.index) for one in laid.values() if one.index_name]
    side_files += _carried(binding)
    files = tuple(file for one in laid.values() for file in one.files)
    side_files += corrected_config(binding, {tensor.label: tensor for file in files for tensor in file.tensors}, dtype)
    inputs = [shard.file for component in checkpoint.components.values() for shard in component.shards]
    inputs += list(
        {tensor.file.identity: tensor.file for adapter, _ in binding.adapters for tensor in adapter.tensors}.values()
    )
    facts = _facts(binding)
    options = {"dtype": dtype.label if dtype else "keep", "shard_size": shard_size, "packed": packed}
    plan = Plan(
        verb="merge",
        files=files,
        side_files=tuple(side_files),
        accounts=tuple(account for one in laid.values() for account in one.accounts),
        ignored=binding.ignored,
        inputs=tuple(inputs),
        roots=(checkpoint.path, *(adapter.path for adapter, _ in binding.adapters)),
        id=hashlib.sha256(json.dumps([__version__, "merge", facts, options], sort_keys=True).encode()).hexdigest(),
        facts=facts,
        warnings=binding.warnings + _left_behind(checkpoint),
    )
    check_conservation(binding, plan)
    return plan


def check_base_id(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> None:
    """Compare the base with the one an adapter says it was made for, where it says so; reads the base then.

    Raises:
        FitError: it is another.
    """
    recorded = [adapter for adapter in adapters if adapter.base_id]
    actual = content_id(checkpoint) if recorded else ""
    for adapter in recorded:
        if adapter.base_id != actual:
            raise FitError(
                f"was made for a base with content id {adapter.base_id[:16]}..., this base has {actual[:16]}...",
                file=adapter.path,
                hint="use it with the base it was made for",
            )


def _carried(binding: Binding) -> list[SideFile]:
    """The base's side files; the adapter's tokenizer where the vocabulary grew."""
    found = {name: SideFile(name, source=path) for name, path in binding.checkpoint.side_files}
    grown = [
        edit for edit in binding.edits.values() if edit.replaced and not edit.added and _grew(edit, binding.checkpoint)
    ]
    for edit in grown:
        assert edit.replaced is not None
        for path in binding.adapters[edit.replaced.adapter][0].side_files:
            found[path.name] = SideFile(path.name, source=path)
    return [found[name] for name in sorted(found)]


def _grew(edit: Edit, checkpoint: Checkpoint) -> bool:
    base = checkpoint.components[edit.component].tensors.get(edit.name)
    return base is not None and edit.source.shape != base.shape


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
                "files": sorted({fingerprint(tensor.file) for tensor in adapter.tensors}),
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
    trained = tensor.step.source
    if tensor.kind == "added":
        return all(trained.file is not shard.file for c in checkpoint.components.values() for shard in c.shards)
    base = checkpoint.components[tensor.component].tensors.get(tensor.name)
    return tensor.kind == "replaced" and (base is None or not same_values(base, trained))


def judge(ledger: Ledger, checkpoint: Checkpoint, weights: Sequence[float]) -> list[str]:
    """Refuse an output equal to the base; warn of updates lost to rounding.

    Raises:
        NothingChangedError: no stored value differs from the base's.
    """
    moved = any(found.changed for found in ledger.measured.values())
    if not moved and not any(_differs(tensor, checkpoint) for tensor in ledger.plan.tensors):
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
