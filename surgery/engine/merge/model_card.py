# SPDX-License-Identifier: Apache-2.0
"""The model card of an output: what it was made of and what was measured.

No paths, no times: the same bytes every time.
"""

from __future__ import annotations

import math

from surgery._version import __version__
from surgery.engine.card_metadata import merge_metadata
from surgery.engine.ledger import Ledger
from surgery.reports.markdown_parts import table_lines
from surgery_formats.binding.bind import Binding
from surgery_formats.models.module_tree import module_graph
from surgery_formats.text import count, markdown, markdown_code, nbytes, show

__all__ = ["merge_card"]


def merge_card(binding: Binding, ledger: Ledger, *, residual: bool = False) -> bytes:
    """README.md of a merged model; with `residual`, of one whose weights are to be used with the LoRA beside them."""
    base = binding.checkpoint
    names = [markdown_code(show(adapter.path.resolve().name)) for adapter, _ in binding.adapters]
    rows = [
        (
            markdown_code(show(adapter.path.resolve().name)),
            markdown(show(f"{adapter.format} {adapter.kind_name}")),
            f"{weight:g}",
            count(adapter.parameters),
        )
        for adapter, weight in binding.adapters
    ]
    parameters = sum(module_graph(component).parameters for component in base.components.values())
    classes = ", ".join(f"{number} {kind}" for kind, number in ledger.classes.items())
    measured = [
        (
            "base",
            f"{markdown_code(show(base.path.resolve().name))}, {count(parameters)} parameters, {nbytes(base.nbytes)}",
        ),
        ("tensors", classes),
    ]
    if not math.isnan(ledger.survival):
        measured += [
            ("of the update, held by the stored type", f"{ledger.survival:.2%}"),
            ("rounding noise, of the update's norm", f"{ledger.rounding:.2%}"),
        ]
    lines = [
        "",
        f"# {markdown_code(show(base.path.resolve().name))} with {', '.join(names)} {'beside it' if residual else 'merged in'}",
        "",
        *table_lines(("adapter", "kind", "weight", "trained parameters"), rows),
        "",
        *table_lines(("measured", ""), measured),
    ]
    notes = [f"- Warning: {markdown(show(warning, 500))}" for warning in ledger.plan.warnings]
    if residual:
        beside = "- The weights do not hold all of the update: attach the LoRA in `adapter/`, for instance with PEFT."
        notes.insert(0, beside)
    lines += ["", *notes] if notes else []
    lines += ["", f"Made by surgery {__version__}; `surgery_manifest.json` accounts for every tensor.", ""]
    return (merge_metadata(binding) + "\n".join(lines)).encode()
