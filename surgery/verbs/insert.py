# SPDX-License-Identifier: Apache-2.0
"""Insert: what was trained, as it is, into a model; or what is to be trained, fresh, beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surgery.engine.execute import Run
from surgery.engine.inputs import (
    AdaptersLike,
    CheckpointLike,
    StrPath,
    as_checkpoint,
    as_path,
    as_weighted,
    check_counts,
    output_path,
)
from surgery.insertion.delta import DeltaResult, insert_delta
from surgery.progress import Callback
from surgery.reports.result import timed
from surgery_formats.errors import FitError, UsageError
from surgery_formats.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from surgery.onnx.export.into_graph import GraphInsertion
    from surgery_formats.canonical.adapter import Adapter

__all__ = ["DeltaResult", "insert"]


@timed
def insert(
    model: CheckpointLike,
    what: AdaptersLike | None = None,
    *,
    base: CheckpointLike | None = None,
    output: StrPath | None = None,
    required: bool = False,
    gated: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> DeltaResult | GraphInsertion:
    """Put the tensors that a fine-tune changed into its base, as they are; or slots for adapters into an ONNX graph.

    Args:
        model: The model: a checkpoint, or an ``.onnx`` file, whoever made it.
        what: Of a checkpoint: an adapter that holds parameters, or rows of them, as a fine-tune has them: biases, norms,
            layers, token rows (what ``extract_lora(dense=..., matrices="full")`` writes). Of a graph: adapters, each of
            which gets a file for the slots.
        base: Of a graph: the checkpoint that it was made of, by whose values its weights are found.
        output: Folder to make. Its parent must exist.
        required: Of a graph: whether slots and strengths are inputs without a default, for runtimes that pass no optional
            ones.
        gated: Of a graph: put the adapters into it, each behind an input for its strength, by default its weight.
        workers: Computing threads; None is one per core, at most eight. Never changes the result.
        overwrite: Replace an existing output, atomically.
        dry_run: Plan only.
        progress: Called with every step.

    Returns:
        What became of every tensor, and the share of the model that was trained; or the slots.

    Raises:
        UsageError: an argument of a wrong type, nothing to insert, or no output.
        InputError: an input cannot be read.
        FitError: it does not fit the base, is more than tensors to be copied, or would be rounded; a graph that was made of
            another base, or has no place for a slot.
        NothingChangedError: the output would be the base.
        OutputExistsError, ResourceError, ProofError: see `surgery.engine.execute.execute`.
    """
    check_counts(workers=workers)
    folder = output_path(output, dry_run=dry_run)
    if what is None:
        raise UsageError("nothing to insert was named")
    if not isinstance(model, Checkpoint) and (path := as_path(model, "model")).suffix == ".onnx":
        options = {"required": required, "gated": gated, "overwrite": overwrite}
        return _into_graph(path, what, base, folder, **options)
    if base is not None or required or gated:
        raise FitError("a checkpoint has no slots", hint="`base=`, `required=` and `gated=` are for an .onnx file")
    run = Run(workers=workers, overwrite=overwrite, progress=progress)
    return insert_delta(as_checkpoint(model, "model"), _one(what), folder, run)


def _one(what: AdaptersLike) -> Adapter:
    """The single thing to insert.

    Raises:
        FitError: several, or one with a weight.
    """
    given = as_weighted(what, "what")
    if len(given) != 1 or given[0].weight != 1.0:
        raise FitError("one thing is put into a checkpoint, and as it is", hint="merge adapters with weights")
    return given[0].adapter


def _into_graph(
    path: Path, what: AdaptersLike, base: CheckpointLike | None, folder: Path | None, **options: bool
) -> GraphInsertion:
    from surgery.onnx.export.adapters import sort_adapters
    from surgery.onnx.export.into_graph import insert_adapters

    if base is None:
        raise UsageError("the weights of a graph are found by those of its base", hint="give it with `base=`")
    return insert_adapters(path, sort_adapters(merge=what).merge, as_checkpoint(base), folder, **options)
