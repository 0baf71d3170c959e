# SPDX-License-Identifier: Apache-2.0
"""Convert a graph: its weights as safetensors, by its own names or, told by their values, by those of its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from surgery.engine.card import CARD, model_name, name_of
from surgery.engine.card_metadata import base_of_card
from surgery.engine.execute import Run, execute
from surgery.engine.ledger import Ledger
from surgery.engine.rebuild.rebuild_plan import plan_rebuilt
from surgery.engine.rebuild.rebuilt_card import rebuilt_card
from surgery.onnx.edit.opening import graph_at
from surgery.onnx.recover.recovered import recovered
from surgery.onnx.recover.result import RecoveryResult
from surgery.progress import Callback
from surgery_formats.adapters.registry import format_at
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.base_name import hub_name
from surgery_formats.models.checkpoint import Checkpoint, open_checkpoint

__all__ = ["RecoveryResult", "convert_graph"]


def convert_graph(
    path: Path,
    base: Checkpoint | None,
    *,
    output: Path | None,
    dtype: DType | None,
    allow_loss: bool,
    overwrite: bool,
    progress: Callback | None,
) -> RecoveryResult:
    """Write the weights of a graph as safetensors. See `surgery.convert`.

    Args:
        path: An ``.onnx`` file, or a folder with one.
        base: The model whose names and layouts the weights get; None keeps the graph's.
        output: Folder to make; None for a dry run.
        dtype: Type of all floats; None keeps each as it is.
        allow_loss: Leave out weights of the base that the graph does not hold as they are.
        overwrite: Replace an existing output.
        progress: Called with every step.

    Raises:
        InputError: the graph cannot be read.
        FitError: a folder of weights, or weights of the base are not there.
        OutputExistsError, ResourceError, ProofError: see `surgery.engine.execute.execute`.
    """
    if path.exists() and format_at(path) is not None:
        raise FitError(
            "an adapter, and safetensors are made of an ONNX graph",
            file=path,
            hint='`to="peft"` or another format of adapters',
        )
    source = open_checkpoint(path)
    if not source.is_graph:
        raise FitError(
            "its weights are a checkpoint's already", file=path, hint="name the graph in it: FOLDER/model.onnx"
        )
    rebuilt = recovered(graph_at(path), source, base, allow_loss=allow_loss)
    plan = replace(plan_rebuilt(rebuilt, dtype), verb="convert")
    if base is not None:
        plan = replace(plan, roots=(*plan.roots, base.path))
    result = RecoveryResult(None, Ledger(plan), str(rebuilt.facts["names"]), plan.warnings)
    if output is None:
        return result

    def finish(ledger: Ledger) -> Mapping[str, bytes]:
        name = None if base is None else hub_name(base) or base_of_card(base.path)
        whose = "" if base is None else f", by the names of {model_name(base)}"
        title = f"The weights of {name_of(graph_at(path).path)}{whose}"
        return {CARD: rebuilt_card(source, title, ledger, gone=("onnx",), name=name, warnings=plan.warnings)}

    ledger = execute(plan, output, Run(overwrite=overwrite, progress=progress), finish)
    return replace(result, output=output, ledger=ledger)
