# SPDX-License-Identifier: Apache-2.0
"""Unmerge: a merge taken back. With what a reversible merge kept, the base returns bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from surgery.engine.execute import Run, execute
from surgery.engine.inputs import (
    AdaptersLike,
    CheckpointLike,
    StrPath,
    as_checkpoint,
    as_weighted,
    check_counts,
    local_path,
    output_path,
)
from surgery.engine.ledger import Ledger
from surgery.engine.undo.unmerge_result import UnmergeResult
from surgery.progress import Callback
from surgery.reports.result import timed
from surgery_formats.binding.bind import bind
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.side_files import BASE_ROUNDING

__all__ = ["UnmergeResult", "unmerge"]


@timed
def unmerge(
    merged: CheckpointLike,
    adapters: AdaptersLike,
    *,
    output: StrPath | None = None,
    base_rounding: StrPath | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> UnmergeResult:
    """Take adapters out of the model they were merged into, and write the base as a folder of its own.

    Args:
        merged: The merged model.
        adapters: What was merged, in the same order and with the same weights; see `surgery.merge`.
        output: Folder to make. Its parent must exist.
        base_rounding: What ``merge(reversible=True)`` kept; by default ``base.rounding`` in the folder of `merged`, if it
            is there. Without it the result is the best estimate.
        workers: Threads that compute, or processes where many have much to do; None is one per core, at most eight
            threads or 16 processes. Never changes the result.
        overwrite: Replace an existing output, atomically.
        dry_run: Plan only.
        progress: Called with every step.

    Returns:
        What came back, and how far it is the base.

    Raises:
        UsageError: an argument of a wrong type, or no output.
        InputError: an input cannot be read, or `base_rounding` is damaged.
        FitError: other adapters were merged, or the file was kept for another model; without the file: an update is not
            in the weights, or has no inverse.
        OutputExistsError, ResourceError, ProofError: see `surgery.engine.execute.execute`; a ProofError, too, if the result
            is not the base that the file was kept for.
    """
    check_counts(workers=workers)
    folder = output_path(output, dry_run=dry_run)
    model = as_checkpoint(merged, "merged")
    weighted = [(entry.adapter, entry.weight) for entry in as_weighted(adapters)]
    if not weighted:
        raise FitError("no adapter was named")
    run = Run(workers=workers, overwrite=overwrite, progress=progress)
    kept = _kept(model, base_rounding)
    if kept is not None:
        from surgery.engine.undo.restore import prove_base, restoration
        from surgery.engine.undo.sidecar import open_sidecar

        restored = restoration(model, weighted, open_sidecar(kept))
        if folder is None:
            return UnmergeResult(None, Ledger(restored.plan))
        ledger = execute(
            restored.plan, folder, run, _nothing, restored, lambda staged: prove_base(staged, restored.base_id)
        )
        return UnmergeResult(folder, ledger, restored.base_id)
    return _estimated(model, weighted, folder, run)


def _kept(model: Checkpoint, base_rounding: StrPath | None) -> Path | None:
    if base_rounding is not None:
        return local_path(base_rounding, "base_rounding")
    beside = model.path / BASE_ROUNDING
    return beside if beside.is_file() else None


def _nothing(ledger: Ledger) -> Mapping[str, bytes]:
    return {}


def _estimated(
    model: Checkpoint, adapters: Sequence[tuple[Adapter, float]], folder: Path | None, run: Run
) -> UnmergeResult:
    from surgery.engine.undo.belongs import recorded_base
    from surgery.engine.undo.estimate import estimation
    from surgery_formats.files.raw import open_file
    from surgery_formats.models.identity import fingerprint

    estimated = estimation(bind(adapters, model), adapters)
    if folder is None:
        return UnmergeResult(None, Ledger(estimated.plan), evidence=estimated.evidence)
    recorded = recorded_base(model.path) if model.path.is_dir() else None
    known = recorded.get("base") if recorded else None
    same: dict[str, bool] = {}

    def last(staged: OutputFolder) -> None:
        estimated.complete()
        for name, expected in known.items() if isinstance(known, dict) else ():
            if (path := staged.staged / name).is_file():
                same[name] = fingerprint(open_file(path)) == expected

    ledger = execute(estimated.plan, folder, run, _nothing, estimated, last)
    exact = bool(same) and all(same.values())
    warnings = () if exact else ("this is an estimate: rounding lost what a reversible merge would have kept",)
    return UnmergeResult(folder, ledger, "", estimated.exact, estimated.evidence, same, warnings)
