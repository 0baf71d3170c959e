# SPDX-License-Identifier: Apache-2.0
"""The model card of an adapter that is begun and not trained yet."""

from __future__ import annotations

from dataclasses import replace

from surgery.engine.adapter_card import LIBRARIES
from surgery.engine.card import CARD, card, measured_table, model_name
from surgery.engine.card_metadata import card_metadata
from surgery.insertion.fresh_result import FreshResult
from surgery.reports.markdown import markdown_rows
from surgery_formats.adapters.format import Rendering
from surgery_formats.models.base_name import hub_name
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["with_fresh_card"]


def with_fresh_card(rendering: Rendering, result: FreshResult, base: Checkpoint, task: str) -> Rendering:
    """`rendering` with a README.md.

    Args:
        rendering: Of the adapter.
        result: What is known of it before it is written.
        base: What it is to be trained on.
        task: As the hub names it, or empty.
    """
    head = card_metadata(
        base.path,
        hub_name(base),
        relation="adapter",
        library=LIBRARIES[result.format],
        task=task,
        tags=(result.kind,),
    )
    text = card(
        head,
        f"A fresh {result.kind} for {model_name(base)}",
        measured_table(markdown_rows(result.figures())),
        notes=["It is not trained: these are the values that training begins with."],
        warnings=result.warnings,
    )
    return replace(rendering, small_files={**rendering.small_files, CARD: text})
