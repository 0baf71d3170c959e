# SPDX-License-Identifier: Apache-2.0
"""Locate: which weight of a checkpoint every tensor of an ONNX graph holds, by value."""

from __future__ import annotations

from surgery.engine.inputs import (
    AdaptersLike,
    CheckpointLike,
    StrPath,
    as_checkpoint,
    as_path,
    as_weighted,
    check_counts,
)
from surgery.onnx.edit.opening import graph_at
from surgery.onnx.fold.standing import warning_of_branches
from surgery.onnx.locate.result import LocateResult
from surgery.onnx.locate.search import Located, located_weights
from surgery.onnx.locate.wanted import wanted_weights
from surgery.reports.result import timed
from surgery_formats.adapters.registry import format_at
from surgery_formats.binding.bind import bind
from surgery_formats.errors import FitError

__all__ = ["LocateResult", "locate"]


@timed
def locate(
    graph: StrPath, base: CheckpointLike, *, adapters: AdaptersLike = (), workers: int | None = None
) -> LocateResult:
    """Find the weights of a checkpoint in an ONNX graph that any exporter made.

    Names are asked only of weights that have equal values. Weights are found as they are, transposed, beside others, in
    slices, with rows in another order, in another type, times a constant, folded with a norm, and as codes within the
    error that their quantiser may make.

    Args:
        graph: An ``.onnx`` file, or a folder with one.
        base: The checkpoint whose weights are looked for, in any container.
        adapters: What was merged into it before the graph was made, as `surgery.merge` takes it.
        workers: Threads that compare; None is one per core, at most eight. Never changes the result.

    Returns:
        Every tensor with what it holds. What is not found is told, and raises nothing.

    Raises:
        InputError: graph or base cannot be read.
        FitError: the base is an adapter, or its weights are codes that nothing reads; an adapter does not fit it.
    """
    check_counts(workers=workers)
    opened = graph_at(as_path(graph, "graph"))
    checkpoint = as_checkpoint(base)
    if checkpoint.path.is_file() and format_at(checkpoint.path) is not None:  # its factors might be found by chance
        raise FitError("an adapter, not the model that a graph was made of", file=checkpoint.path)
    weighted = [(entry.adapter, entry.weight) for entry in as_weighted(adapters)]
    binding = bind(weighted, checkpoint) if weighted else None
    located = located_weights(opened, wanted_weights(checkpoint, binding), workers=workers)
    warnings = (*_doubts(located, bool(weighted)), *warning_of_branches(opened))
    opened.check_unchanged()
    checkpoint.check_unchanged()
    return LocateResult(opened.path, checkpoint.path, located, warnings)


def _doubts(located: Located, merged: bool) -> tuple[str, ...]:
    """A word where a graph holds little of a base: it is more likely another's than an exporter's doing."""
    sizes = {weight.label: weight.rows * weight.cols for weight in located.weights}
    found = sum(sizes[weight.label] for weight in located.whole)
    if 2 * found >= sum(sizes.values()):
        return ()
    why = "or without the adapters that were named?" if merged else "or merged since? --adapter names what was merged"
    return (f"less than half of the base is in the graph: was it made of another model, {why}",)
