# SPDX-License-Identifier: Apache-2.0
"""What a model card tells of a ledger: what the model was made of, what became of its tensors, whether they are codes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from surgery.engine.card import model_name
from surgery.engine.card_metadata import Relation
from surgery.engine.ledger import Ledger
from surgery.engine.plan import is_coded
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.module_tree import module_graph
from surgery_formats.text import count, markdown, nbytes

__all__ = ["base_row", "measured_of", "relation_of"]


def relation_of(ledger: Ledger, otherwise: Relation) -> Relation:
    """``quantized`` of what was stored as codes, as the hub calls it; else what it is besides."""
    return "quantized" if any(is_coded(tensor.step) for tensor in ledger.plan.computed()) else otherwise


def base_row(base: Checkpoint) -> tuple[str, str]:
    """What a model was made of."""
    parameters = sum(module_graph(component).parameters for component in base.components.values())
    return "base", f"{model_name(base)}, {count(parameters)} parameters, {nbytes(base.nbytes)}"


def measured_of(ledger: Ledger) -> Iterator[tuple[str, str]]:
    """What became of the tensors, and of an update."""
    if trained := ledger.plan.facts.get("as_trained"):
        yield "as trained", markdown(trained["said"])
    yield "tensors", ", ".join(f"{number} {kind}" for kind, number in ledger.classes.items())
    if not math.isnan(ledger.survival):
        yield "of the update, held by the stored type", f"{ledger.survival:.2%}"
        yield "rounding noise, of the update's norm", f"{ledger.rounding:.2%}"
