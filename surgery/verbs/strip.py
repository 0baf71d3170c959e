# SPDX-License-Identifier: Apache-2.0
"""Strip: a graph without what it tells of the machine and the source it was exported from."""

from __future__ import annotations

from surgery.engine.inputs import StrPath, local_path, output_path
from surgery.onnx.edit.strip import StripResult, strip_graph
from surgery.onnx.run.opening import find_graph
from surgery.reports.result import timed

__all__ = ["StripResult", "strip"]


@timed
def strip(
    model: StrPath,
    *,
    output: StrPath | None = None,
    all_metadata: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> StripResult:
    """Write an ONNX graph without the lines of source that exporters leave in it. Nodes and weights stay as they are.

    Args:
        model: The ``.onnx`` file, or a folder with ``model.onnx``.
        output: Folder to make. Its parent must exist.
        all_metadata: Take out all metadata and documentation of nodes, values and functions: names of modules and classes,
            too. What the model says of itself as a whole stays, a contract among it.
        overwrite: Replace an existing output, atomically.
        dry_run: Say what would be taken out, write nothing.

    Raises:
        UsageError: an argument of a wrong type, or no output.
        InputError: the graph cannot be read.
        NothingChangedError: there is nothing to take out.
        FitError, OutputExistsError, ResourceError, ProofError: nothing is written.
    """
    folder = output_path(output, dry_run=dry_run)
    return strip_graph(find_graph(local_path(model, "model")), folder, every=all_metadata, overwrite=overwrite)
