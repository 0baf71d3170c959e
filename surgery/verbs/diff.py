# SPDX-License-Identifier: Apache-2.0
"""Diff: what changed between two adapters, or between two checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from surgery.comparison.adapters import diff_adapters
from surgery.comparison.checkpoints import CheckpointDiff, diff_checkpoints
from surgery.comparison.graph_diff import GraphDiff
from surgery.comparison.results import AdapterDiff
from surgery.engine.inputs import CheckpointLike, Openable, as_checkpoint, opened_or_graph
from surgery.progress import Callback
from surgery.reports.result import timed
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.containers.onnx import open_graph
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import local_name

__all__ = ["diff"]


@timed
def diff(
    a: Openable,
    b: Openable,
    *,
    header: bool = False,
    spectrum: bool = False,
    intruders: bool = False,
    tolerance: float | None = None,
    base: CheckpointLike | None = None,
    progress: Callback | None = None,
) -> AdapterDiff | CheckpointDiff | GraphDiff:
    """Compare two files or folders of one sort.

    Adapters are compared by what they add to each weight, whatever their format, rank and factors; checkpoints tensor
    by tensor. Of ONNX graphs nodes, inputs and tensors are compared, and tensors are told by their values where names
    differ; a graph is compared with a checkpoint, too.

    Args:
        a: Adapter, checkpoint or graph: a path, or what was opened.
        b: Another of the same sort.
        header: Compare names, types, shapes (and an adapter's ranks and scales) alone; no value is read.
        spectrum: Of checkpoints' differing matrices, work out how the difference spreads over directions; adapters
            always have it.
        intruders: Of checkpoints' differing matrices, count B's strong directions that resemble none of A's
            (`surgery.comparison.intruders`). It takes a decomposition of every such matrix.
        tolerance: Relative difference up to which a weight counts as equal; by default 0 for checkpoints, 1e-6 for
            adapters.
        base: Of adapters: the model that both were trained on. It brings names of two programs together, and fused weights
            and their parts; without it, two names for one weight are two weights.
        progress: Called with every tensor.

    Raises:
        InputError: one of them cannot be read.
        FitError: an adapter and a checkpoint, intruders of what are no models, a tolerance below 0, an adapter that is not
            of the base, or models and a base.
        ProofError: a checkpoint changed while it was read.
    """
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise FitError(f"a tolerance of {tolerance:g}", hint="give 0 or more")
    old, new = opened_or_graph(a, "a"), opened_or_graph(b, "b")
    if intruders and not (isinstance(old, Checkpoint) and isinstance(new, Checkpoint)):
        raise FitError("intruder directions are told of two models alone", hint="merge an adapter into its base first")
    names = _called(a), _called(b)
    if isinstance(old, Adapter) and isinstance(new, Adapter):
        model = None if base is None else as_checkpoint(base)
        return replace(diff_adapters(old, new, header=header, tolerance=tolerance, base=model), names=names)
    if isinstance(old, Adapter) or isinstance(new, Adapter):
        raise FitError(
            "one is an adapter, the other a full model",
            file=new
            if isinstance(new, Path)
            else old
            if isinstance(old, Path)
            else (new if isinstance(old, Adapter) else old).path,
            hint="extract a LoRA from the model, or merge the adapter into its base, to compare like with like",
        )
    if base is not None:
        raise FitError("a base brings names of adapters together, and these are models", hint="leave out `base=`")
    if isinstance(old, Path) or isinstance(new, Path):
        from surgery.comparison.graphs import diff_graphs

        sides = (open_graph(side) if isinstance(side, Path) else side for side in (old, new))
        graphs = diff_graphs(*sides, header=header, spectrum=spectrum, tolerance=tolerance, progress=progress)
        return replace(graphs, names=names)
    models = diff_checkpoints(
        old, new, header=header, spectrum=spectrum, intruders=intruders, tolerance=tolerance, progress=progress
    )
    return replace(models, names=names)


def _called(side: Openable) -> str:
    """The name that a side was given by; of a path of this machine its last part."""
    given = str(side.path if isinstance(side, Checkpoint | Adapter) else side)
    return local_name(given).rstrip("/") or given
