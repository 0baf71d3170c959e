# SPDX-License-Identifier: Apache-2.0
"""Fold: the LoRA branches of an ONNX graph into the weights beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from surgery.engine.inputs import StrPath, local_path, output_path
from surgery.onnx.fold.fold_graph import FoldResult, fold_graph
from surgery.onnx.run.opening import find_graph
from surgery.progress import Callback
from surgery.reports.result import timed

__all__ = ["FoldResult", "fold"]


@timed
def fold(
    model: StrPath,
    adapters: StrPath | Sequence[StrPath | tuple[StrPath, float]] = (),
    *,
    output: StrPath | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> FoldResult:
    """Add every LoRA that is a branch of a graph to the weight beside it, and take the branch away.

    Branches are known by what their nodes do: slots of ours and of Olive, adapters with a strength, what the genai builder
    makes of ``adapter_path``, and a model of PEFT's that torch traced.

    Args:
        model: The ``.onnx`` file, or a folder with ``model.onnx``.
        adapters: What goes into the graph's slots: ``.onnx_adapter`` files, with weights; or, with the strength to fold it
            at, the name of an adapter that is in the graph. Without them, what the graph does by itself.
        output: Folder to make. Its parent must exist.
        overwrite: Replace an existing output, atomically.
        dry_run: Say what would be folded, write nothing.
        progress: Not called: the bytes are copied in one go.

    Raises:
        UsageError: an argument of a wrong type, or no output.
        InputError: something cannot be read.
        NothingChangedError: there is no branch in the graph.
        FitError: a branch that is no plain sum with a weight of numbers, or an adapter that the graph has no inputs for.
        OutputExistsError, ResourceError, ProofError: nothing is written.
    """
    folder = output_path(output, dry_run=dry_run)
    return fold_graph(find_graph(local_path(model, "model")), _weighted(adapters), folder, overwrite=overwrite)


def _weighted(adapters: StrPath | Sequence[StrPath | tuple[StrPath, float]]) -> list[tuple[Path, float]]:
    given = [adapters] if isinstance(adapters, str | os.PathLike) else adapters
    pairs = [entry if isinstance(entry, tuple) else (entry, 1.0) for entry in given]
    return [(local_path(entry, "adapters"), float(weight)) for entry, weight in pairs]
