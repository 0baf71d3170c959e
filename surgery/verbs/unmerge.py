# SPDX-License-Identifier: Apache-2.0
"""Unmerge: a merge taken back. With what a reversible merge kept, the base returns bit for bit.

Of three things, a base, an adapter and their merge, it finds either of the first two from the others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from surgery.engine.card import CARD, model_name, name_of
from surgery.engine.card_metadata import base_of_card
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
from surgery.engine.inputs import open as open_reference
from surgery.engine.ledger import Ledger
from surgery.engine.rebuild.rebuilt_card import rebuilt_card
from surgery.engine.undo.unmerge_result import OfCodes, UnmergeResult
from surgery.extraction.result import ExtractResult
from surgery.progress import Callback
from surgery.reports.result import timed
from surgery_formats.binding.bind import bind
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import UsageError
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.models.base_name import is_hub_name
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.side_files import BASE_ROUNDING

__all__ = ["UnmergeResult", "kept_beside", "unmerge"]

_ESTIMATE = "this is an estimate: rounding lost what a reversible merge would have kept"


@timed
def unmerge(
    model: CheckpointLike,
    adapters: AdaptersLike | Checkpoint,
    *,
    output: StrPath | None = None,
    base_rounding: StrPath | None = None,
    rank: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> UnmergeResult | ExtractResult:
    """Take adapters out of the model they were merged into, and write the base; or find the adapter of two models.

    Args:
        model: The merged model; or the base, if a model follows.
        adapters: What was merged, in the same order and with the same weights, see `surgery.merge`; or the merged model,
            whose LoRA is then found beyond the rounding of the merge.
        output: Folder to make. Its parent must exist.
        base_rounding: What ``merge(reversible=True)`` kept; by default ``base.rounding`` in the folder of `merged`, if it
            is there. Without it the result is the best estimate.
        rank: Of the adapter that is looked for; None finds it.
        workers: Computing threads; None is one per core, at most eight. Never changes the result.
        overwrite: Replace an existing output, atomically.
        dry_run: Plan only.
        progress: Called with every step.

    Returns:
        What came back, and how far it is the base; of two models, as `surgery.extract_lora`.

    Raises:
        UsageError: an argument of a wrong type, no adapter, or no output.
        InputError: an input cannot be read, or `base_rounding` is damaged.
        FitError: other adapters were merged, or the file was kept for another model; without the file: an update is not
            in the weights, or has no inverse.
        OutputExistsError, ResourceError, ProofError: see `surgery.engine.execute.execute`; a ProofError, too, if the result
            is not the base that the file was kept for.
    """
    check_counts(workers=workers, rank=rank)
    if (after := _model_of(adapters)) is not None:
        from surgery.rank import Rank
        from surgery.verbs.extract_lora import extract_lora

        if base_rounding is not None:
            raise UsageError("base_rounding belongs to a merged model and its adapters, and two models were given")
        return extract_lora(
            model,
            after,
            output=output,
            rank=Rank.auto if rank is None else rank,
            dtype="fp32",
            beyond_rounding=True,
            workers=workers,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    if rank is not None:
        raise UsageError("rank is that of an adapter to be found, and an adapter was given")
    folder = output_path(output, dry_run=dry_run)
    merged = as_checkpoint(model, "model")
    assert not isinstance(adapters, Checkpoint)  # that is a model, see above
    weighted = [(entry.adapter, entry.weight) for entry in as_weighted(adapters)]
    run = Run(workers=workers, overwrite=overwrite, progress=progress)
    kept = kept_beside(merged) if base_rounding is None else local_path(base_rounding, "base_rounding")
    if not weighted:
        from surgery.engine.undo.unnamed import none_named

        raise none_named(merged.path, kept)
    if kept is not None:
        from surgery.engine.undo.restore import prove_base, restoration
        from surgery.engine.undo.sidecar import open_sidecar

        restored = restoration(merged, weighted, open_sidecar(kept))
        if folder is None:
            return UnmergeResult(None, Ledger(restored.plan))
        ledger = execute(
            restored.plan, folder, run, engine=restored, last=lambda staged: prove_base(staged, restored.base_id)
        )
        return UnmergeResult(folder, ledger, restored.base_id)
    return _estimated(merged, weighted, folder, run)


def _model_of(value: object) -> Checkpoint | None:
    """The model that a single argument is or names; None for adapters."""
    if isinstance(value, list | tuple) and len(value) == 1:
        (value,) = value
    if isinstance(value, tuple) and len(value) == 2 and value[1] == 1.0:
        value = value[0]
    if isinstance(value, str | os.PathLike):
        value = open_reference(value)
    return value if isinstance(value, Checkpoint) else None


def kept_beside(model: Checkpoint) -> Path | None:
    """What a reversible merge kept in the folder of a merged model; None without it."""
    beside = model.path / BASE_ROUNDING
    return beside if beside.is_file() else None


def _estimated(
    model: Checkpoint, adapters: Sequence[tuple[Adapter, float]], folder: Path | None, run: Run
) -> UnmergeResult:
    from surgery.engine.undo.belongs import recorded_base
    from surgery.engine.undo.estimate import estimation
    from surgery_formats.files.raw import open_file
    from surgery_formats.models.identity import fingerprint

    recorded = recorded_base(model.path, adapters) if model.path.is_dir() else None  # before other reasons to refuse
    estimated = estimation(bind(adapters, model), adapters, recorded)
    trained = recorded is not None and recorded.get("as_trained") is not None
    of_codes = OfCodes(estimated.dequantised, as_trained=trained)
    if folder is None:
        ledger, evidence = Ledger(estimated.plan), estimated.evidence
        return UnmergeResult(None, ledger, evidence=evidence, warnings=of_codes.warnings, of_codes=of_codes)
    known = recorded.get("base") if recorded else None
    same: dict[str, bool] = {}

    ledgers: list[Ledger] = []

    def finish(ledger: Ledger) -> Mapping[str, bytes]:
        ledgers.append(ledger)  # the card waits until it is known whether this is the base
        return {}

    def last(staged: OutputFolder) -> None:
        estimated.complete()
        for name, expected in known.items() if isinstance(known, dict) else ():
            if (path := staged.staged / name).is_file():
                same[name] = fingerprint(open_file(path)) == expected
        warnings = (*_estimate(same), *of_codes.warnings)
        staged.write_small(CARD, _card(model, adapters, ledgers[0], warnings))

    ledger = execute(estimated.plan, folder, run, finish, estimated, last)
    warnings = (*_estimate(same), *of_codes.warnings)
    return UnmergeResult(folder, ledger, "", estimated.exact, estimated.evidence, same, warnings, of_codes)


def _estimate(same: Mapping[str, bool]) -> tuple[str, ...]:
    """What is said where not every file is known to be the base's."""
    return () if same and all(same.values()) else (_ESTIMATE,)


def _card(
    model: Checkpoint, adapters: Sequence[tuple[Adapter, float]], ledger: Ledger, warnings: Sequence[str]
) -> bytes:
    told = {adapter.base_name for adapter, _ in adapters}
    common = told.pop() if len(told) == 1 else ""
    name = base_of_card(model.path) or (common if is_hub_name(common) else "")
    title = f"{model_name(model)} without {', '.join(name_of(adapter.path) for adapter, _ in adapters)}"
    return rebuilt_card(model, title, ledger, adapters=adapters, gone=("merge",), name=name, warnings=warnings)
