# SPDX-License-Identifier: Apache-2.0
"""Merge into an ONNX graph that any exporter made: only the bytes of located weights change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from surgery.engine.card import CARD, name_of
from surgery.engine.card_figures import measured_of, relation_of
from surgery.engine.execute import Run, default_workers, execute
from surgery.engine.input_checks import check_base_id
from surgery.engine.inputs import AdaptersLike, CheckpointLike, as_checkpoint, as_weighted
from surgery.engine.ledger import Ledger
from surgery.engine.merge.merge_result import MergeResult
from surgery.engine.selection import Selection, left_out_warning
from surgery.onnx.edit.graph_card import edited_card
from surgery.onnx.edit.opening import graph_at
from surgery.onnx.fold.standing import warning_of_branches
from surgery.onnx.merge.graph_plan import GraphEngine, GraphPlan, plan_graph, prove_structure
from surgery_formats.binding.bind import Binding, bind
from surgery_formats.containers.onnx import OnnxGraph
from surgery_formats.errors import FitError
from surgery_formats.files.output.folder import OutputFolder

__all__ = ["merge_graph"]


def merge_graph(
    path: Path,
    base: CheckpointLike,
    adapters: AdaptersLike,
    folder: Path | None,
    run: Run,
    *,
    without: Sequence[str] = (),
    accept_loss: bool = False,
) -> MergeResult:
    """Merge adapters into a graph, and write it with its files as a folder of its own.

    Args:
        path: The graph, or a folder with one.
        base: The checkpoint that it was made of.
        adapters: As `surgery.merge` takes them.
        folder: Folder to make; None for a dry run.
        run: How.
        without: Patterns of modules of the adapters to leave out.
        accept_loss: Write codes that hold less than half of the update, too.

    Raises:
        FitError: the adapters do not fit the base, or a weight that they change is not in the graph with the base's values.
        NothingChangedError, OutputExistsError, ResourceError, ProofError: as `surgery.merge`.
    """
    from surgery.engine.output_checks import check_output

    weighted = as_weighted(adapters)
    if not weighted:
        raise FitError("no adapter was named")
    weighted, left = Selection(without=tuple(without)).chosen(weighted) if without else (weighted, ())
    checkpoint = as_checkpoint(base, "graph_of")
    binding = bind([(entry.adapter, entry.weight) for entry in weighted], checkpoint)
    if left:
        binding = replace(binding, warnings=(*binding.warnings, left_out_warning(left)))
    check_base_id(checkpoint, [entry.adapter for entry in weighted])
    graph = graph_at(path)
    binding = replace(binding, warnings=(*binding.warnings, *warning_of_branches(graph)))
    planned = _planned(graph, binding, left, run, compare=folder is None)
    plan = planned.plan
    if folder is None:
        return MergeResult(None, Ledger(plan), plan.warnings)
    warnings = [*plan.warnings]

    def finish(ledger: Ledger) -> Mapping[str, bytes]:
        warnings.extend(
            check_output(ledger, checkpoint, [weight for _, weight in binding.adapters], accept_loss=accept_loss)
        )
        text = edited_card(
            graph.path,
            f"with {', '.join(name_of(adapter.path) for adapter, _ in binding.adapters)} merged in",
            measured_of(ledger),
            base=checkpoint,
            adapters=binding.adapters,
            relation=relation_of(ledger, "merge"),
            warnings=warnings,
        )
        return {CARD: text}

    def last(staged: OutputFolder) -> None:
        prove_structure(staged.staged / plan.files[0].name, graph)

    ledger = execute(plan, folder, run, finish, GraphEngine(planned), last, planned.still_good)
    return MergeResult(folder, ledger, tuple(warnings))


def _planned(graph: OnnxGraph, binding: Binding, left: Sequence[str], run: Run, *, compare: bool) -> GraphPlan:
    """The plan; what is written is compared with the base while it is computed, a dry run does it here."""
    from surgery.onnx.locate.search import located_weights
    from surgery.onnx.locate.wanted import wanted_weights
    from surgery.onnx.merge.changes import changes_of, touched_labels

    located = located_weights(
        graph,
        wanted_weights(binding.checkpoint),
        touched=touched_labels(binding),
        tables=False,
        compare=compare,
        workers=run.workers or default_workers(),
    )
    return plan_graph(graph, changes_of(located, binding), binding, left)
