# SPDX-License-Identifier: Apache-2.0
"""Diff: what changed between two adapters, or between two checkpoints."""

from __future__ import annotations

import math
import os
from pathlib import Path

from surgery.comparison.adapters import AdapterDiff, diff_adapters
from surgery.comparison.checkpoints import CheckpointDiff, diff_checkpoints
from surgery.progress import Callback
from surgery.verbs.inspect import read_if_adapter
from surgery_formats.errors import FitError, NotFoundError
from surgery_formats.models.checkpoint import open_checkpoint

__all__ = ["diff"]


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    header: bool = False,
    spectrum: bool = False,
    tolerance: float | None = None,
    progress: Callback | None = None,
) -> AdapterDiff | CheckpointDiff:
    """Compare two files or folders of one sort.

    Adapters are compared by what they add to each weight, whatever their format, rank and factors; checkpoints tensor by tensor.

    Args:
        a: Adapter or checkpoint.
        b: Another of the same sort.
        header: Compare names, types, shapes (and an adapter's ranks and scales) alone; no value is read.
        spectrum: Of checkpoints' differing matrices, work out how the difference spreads over directions; adapters always have it.
        tolerance: Relative difference up to which a weight counts as equal; by default 0 for checkpoints, 1e-6 for adapters.
        progress: Called with every tensor.

    Raises:
        InputError: one of them cannot be read.
        FitError: an adapter and a checkpoint, or a tolerance below 0.
        ProofError: a checkpoint changed while it was read.
    """
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise FitError(f"a tolerance of {tolerance:g}", hint="give 0 or more")
    paths = Path(a), Path(b)
    for path in paths:
        if not path.exists():
            raise NotFoundError("no such file or folder", file=path)
    one, other = (read_if_adapter(path) for path in paths)
    if one is not None and other is not None:
        return diff_adapters(one, other, header=header, tolerance=tolerance)
    if one is not None or other is not None:
        raise FitError(
            "one is an adapter, the other a full model",
            file=paths[1 if one is not None else 0],
            hint="extract a LoRA from the model, or merge the adapter into its base, to compare like with like",
        )
    mine, theirs = (open_checkpoint(path) for path in paths)
    return diff_checkpoints(mine, theirs, header=header, spectrum=spectrum, tolerance=tolerance, progress=progress)
