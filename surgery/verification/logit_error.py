# SPDX-License-Identifier: Apache-2.0
"""How far the logits of a graph are from those of the model that its weights were rounded from, on a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from surgery.engine.merge.merge_plan import plan_merge
from surgery.onnx.export.adapters import AdapterRoles
from surgery.onnx.run.text_rows import rows_of_text
from surgery.reference import Reference, forward, open_reference
from surgery.verification.finite import nothing_to_compare
from surgery.verification.result import LogitError
from surgery.verification.sentence import own_task
from surgery.verification.session import GraphFile, Session, read_graph
from surgery.verification.strengths import gated_of, with_gated
from surgery_formats.binding.bind import bind
from surgery_formats.errors import FitError, ProofError
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["check_measurable", "error_on_text"]


def error_on_text(path: Path, base: Checkpoint, roles: AdapterRoles, text: str) -> LogitError:
    """The error of a graph's logits on a text, to those of the base with what was merged into it.

    Args:
        path: The graph.
        base: The base.
        roles: Adapters: merged ones, and those inside the graph with the strengths that they get.
        text: See `surgery.onnx.run.text_rows.rows_of_text`.

    Raises:
        FitError: a graph without logits of texts, see `check_measurable`.
        ProofError: logits of other sizes, such as are no numbers, or a model whose logits are all 0.
    """
    check_measurable(path)
    graph = read_graph(path)
    gated, roles = gated_of(graph.contract, roles)
    plan = plan_merge(bind(roles.merged, base, new_biases=True)) if roles.merged else None
    wanted = open_reference(base.main, plan, task=own_task(graph.contract))
    if gated.named:
        wanted = with_gated(wanted, base, gated, graph.contract)
    rows = rows_of_text(base.main.folder, text, wanted.model.vocabulary, graph.contract.max_length)
    return _measured(graph, gated.strengths, wanted, rows)


def check_measurable(path: Path) -> None:
    """Refuse graphs whose logits belong to no token of a text.

    Raises:
        FitError: there are none, or something stands in front.
    """
    graph = read_graph(path)
    contract, outputs = graph.contract, {port.name for port in graph.model.graph.output}
    inputs = {port.name for port in graph.model.graph.input}
    if contract.encoder or contract.task == "multiple-choice" or "logits" not in outputs or "pixel_values" in inputs:
        raise FitError(
            "logits on a text are measured of decoders, and of encoders of texts with logits, one graph by itself",
            file=graph.path,
            hint="leave `text=` away",
        )
    if contract.virtual_tokens or contract.inserted:
        raise FitError(
            "logits on a text are measured of graphs without a soft prompt or inserted modules",
            file=graph.path,
            hint="leave `text=` away",
        )


def _measured(
    graph: GraphFile, strengths: Mapping[str, float], wanted: Reference, rows: Sequence[Sequence[int]]
) -> LogitError:
    """Run the graph and the model that it was made of on rows of tokens."""
    session, count, same = Session(graph, strengths), 0, 0
    energy = error = divergence = 0.0
    for row in rows:
        ids = np.array([row], np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), **session.past(1)}
        if "token_type_ids" in session.inputs:
            feed["token_type_ids"] = np.zeros_like(ids)
        found = torch.from_numpy(session.run(feed)["logits"]).double()
        expected = _logits(wanted, torch.from_numpy(ids)).double()
        if found.shape != expected.shape:
            text = f"logits of the shape {list(found.shape)} instead of {list(expected.shape)}"
            raise ProofError(text, file=graph.path)
        energy += float(expected.square().sum())
        error += float((found - expected).square().sum())
        same += int((found.argmax(-1) == expected.argmax(-1)).sum())
        count += expected[..., 0].numel()
        model, own = torch.log_softmax(expected, -1), torch.log_softmax(found, -1)
        divergence += float((model.exp() * (model - own)).sum())
    if not math.isfinite(error):
        raise ProofError("logits on the text are not finite", file=graph.path)
    if not energy:
        raise nothing_to_compare(graph.path, "logits on the text")
    return LogitError(count, math.sqrt(error / energy), same / count, max(divergence / count, 0.0))


def _logits(model: Reference, ids: torch.Tensor) -> torch.Tensor:
    computed = forward(model, ids)
    return computed.logits if model.model.generates else computed.outputs["logits"]
