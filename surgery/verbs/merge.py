# SPDX-License-Identifier: Apache-2.0
"""Merge: the base with everything the adapters trained folded into its weights, at the cost of copying the file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.engine.checks import float_type, required_output
from surgery.engine.execute import Run, execute
from surgery.engine.ledger import Ledger
from surgery.engine.model_card import merge_card
from surgery.engine.model_output import judge, plan_merge
from surgery.progress import Callback
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.binding.bind import bind
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.text import show

__all__ = ["MergeResult", "merge"]


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
        layout: ``keep`` the base's order of tensors; ``packed`` puts those that a graph reads together together (`surgery.engine.packing`).
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
        OutputExistsError, ResourceError, ProofError: see `surgery.engine.execute.execute`.
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
    plan = plan_merge(found, dtype=float_type(dtype, "weights"), shard_size=shard_size, packed=layout == "packed")
    if dry_run:
        return MergeResult(None, Ledger(plan), plan.warnings)
    folder = required_output(output)
    run = Run(workers, memory_limit, device, verify == "full", overwrite, progress)
    warnings: list[str] = list(plan.warnings)

    def finish(ledger: Ledger) -> Mapping[str, bytes]:
        warnings.extend(judge(ledger, found.checkpoint, [weight for _, weight in found.adapters]))
        return {"README.md": merge_card(found, ledger)}

    ledger = execute(plan, folder, run, finish)
    return MergeResult(folder, ledger, tuple(warnings))


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
