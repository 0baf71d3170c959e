# SPDX-License-Identifier: Apache-2.0
"""Graphs where checkpoints were expected: their weights, under the names of a base, in a folder that is gone afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from surgery.engine.execute import Run
from surgery.onnx.edit.opening import graph_at
from surgery.onnx.locate.search import Located, located_weights
from surgery.onnx.locate.twins import found_as_in
from surgery.onnx.locate.wanted import wanted_weights
from surgery.onnx.recover.graph_checkpoint import write_checkpoint
from surgery_formats.files.output.output_file import output_faults
from surgery_formats.files.output.scratch import scratch_folder
from surgery_formats.models.checkpoint import Checkpoint, open_checkpoint

__all__ = ["as_checkpoints"]


@contextlib.contextmanager
def as_checkpoints(
    base: Path | None, tuned: Path | None, names: Checkpoint, beside: Path | None, workers: int | None
) -> Iterator[tuple[Checkpoint | None, Checkpoint | None]]:
    """Checkpoints of two graphs.

    Args:
        base: A graph that holds the values of `names`; None for none.
        tuned: A graph of a fine-tune of it; None for none. With the nodes of the other one its weights lie as there, else
            they are found as long as they are near.
        names: The checkpoint that the graphs were made of, or its base.
        beside: Folder on whose disk they are written.
        workers: Threads that search and write.

    Raises:
        FitError: a weight is not in a graph.
        ResourceError: the folder cannot be written to.
    """
    with scratch_folder(beside) as folder:
        found: list[Checkpoint | None] = []
        known: Located | None = None
        for part, path in (("base", base), ("tuned", tuned)):
            if path is None:
                found.append(None)
                continue
            graph = graph_at(path)
            twin = None if known is None else found_as_in(known, graph)
            located = twin or located_weights(graph, wanted_weights(names), workers=workers)
            known = located
            written = folder / part / names.path.resolve().name  # adapters say what their base is called
            with output_faults(folder):
                written.parent.mkdir()
            write_checkpoint(located, names, written, Run(workers=workers), changed=part == "tuned")
            found.append(open_checkpoint(written))
        yield found[0], found[1]
