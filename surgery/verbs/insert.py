# SPDX-License-Identifier: Apache-2.0
"""Insert: what was trained, as it is, into a model; or what is to be trained, fresh, beside it."""

from __future__ import annotations

from surgery.engine.execute import Run
from surgery.engine.inputs import (
    AdapterLike,
    CheckpointLike,
    StrPath,
    as_adapter,
    as_checkpoint,
    check_counts,
    output_path,
)
from surgery.insertion.delta import DeltaResult, insert_delta
from surgery.progress import Callback
from surgery.reports.result import timed
from surgery_formats.errors import UsageError

__all__ = ["DeltaResult", "insert"]


@timed
def insert(
    base: CheckpointLike,
    what: AdapterLike | None = None,
    *,
    output: StrPath | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> DeltaResult:
    """Put the tensors that a fine-tune changed into its base, as they are.

    Args:
        base: The model.
        what: An adapter that holds parameters, or rows of them, as a fine-tune has them: biases, norms, layers, token
            rows (what ``extract_lora(dense=..., matrices="full")`` writes).
        output: Folder to make. Its parent must exist.
        workers: Computing threads; None is one per core, at most eight. Never changes the result.
        overwrite: Replace an existing output, atomically.
        dry_run: Plan only.
        progress: Called with every step.

    Returns:
        What became of every tensor, and the share of the model that was trained.

    Raises:
        UsageError: an argument of a wrong type, nothing to insert, or no output.
        InputError: an input cannot be read.
        FitError: it does not fit the base, is more than tensors to be copied, or would be rounded.
        NothingChangedError: the output would be the base.
        OutputExistsError, ResourceError, ProofError: see `surgery.engine.execute.execute`.
    """
    check_counts(workers=workers)
    folder = output_path(output, dry_run=dry_run)
    if what is None:
        raise UsageError("nothing to insert was named")
    run = Run(workers=workers, overwrite=overwrite, progress=progress)
    return insert_delta(as_checkpoint(base), as_adapter(what, "what"), folder, run)
