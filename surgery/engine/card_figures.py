# SPDX-License-Identifier: Apache-2.0
"""What a model card tells of a ledger: what the model was made of, what became of its tensors, whether they are codes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from surgery.engine.card import model_name
from surgery.engine.card_metadata import Relation
from surgery.engine.ledger import Ledger
from surgery.engine.plan import Compute
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.module_tree import module_graph
from surgery_formats.storage.base import Encoding, is_storage
from surgery_formats.storage.quantised import is_coded
from surgery_formats.text import count, markdown, markdown_code, nbytes, show

__all__ = ["base_row", "code_rows", "measured_of", "relation_of"]


def relation_of(ledger: Ledger, otherwise: Relation) -> Relation:
    """``quantized`` of what was stored as codes, as the hub calls it; else what it is besides."""
    return "quantized" if _codes(ledger)[0] else otherwise


def base_row(base: Checkpoint) -> tuple[str, str]:
    """What a model was made of."""
    parameters = sum(module_graph(component).parameters for component in base.components.values())
    return "base", f"{model_name(base)}, {count(parameters)} parameters, {nbytes(base.nbytes)}"


def code_rows(ledger: Ledger) -> Iterator[tuple[str, str]]:
    """The formats of weights that are stored as codes, apart by whether these were chosen again; no row without any."""
    told = [
        f"{what}: "
        + ", ".join(f"{number:,} in {markdown_code(show(kind, 40))}" for kind, number in kinds.most_common())
        for what, kinds in zip(("chosen again", "as they were"), _codes(ledger), strict=True)
        if kinds
    ]
    if told:
        yield "weights in codes", "; ".join(told)


def measured_of(ledger: Ledger) -> Iterator[tuple[str, str]]:
    """What became of the tensors, and of an update."""
    if trained := ledger.plan.facts.get("as_trained"):
        yield "as trained", markdown(trained["said"])
    yield "tensors", ", ".join(f"{number} {kind}" for kind, number in ledger.classes.items())
    if not math.isnan(ledger.survival):
        yield "of the update, held by the stored type", f"{ledger.survival:.2%}"
        yield "rounding noise, of the update's norm", f"{ledger.rounding:.2%}"


def _codes(ledger: Ledger) -> tuple[Counter[str], Counter[str]]:
    """Formats of the codes that were chosen again, and of those that were copied."""
    again, kept = Counter[str](), Counter[str]()
    for tensor in ledger.plan.weights:
        computed = isinstance(tensor.step, Compute)
        written: Encoding = tensor.step.target if isinstance(tensor.step, Compute) else tensor.step.weight
        if is_storage(written) and is_coded(written):
            (again if computed else kept)[written.kind] += 1
    return again, kept
