# SPDX-License-Identifier: Apache-2.0
"""The model card of a merge, and of what else is a base with adapters in it."""

from __future__ import annotations

from surgery.engine.card import adapter_table, card, measured_table, model_name, name_of
from surgery.engine.card_figures import base_row, code_rows, measured_of, relation_of
from surgery.engine.card_metadata import Relation, card_metadata
from surgery.engine.ledger import Ledger
from surgery_formats.binding.bind import Binding
from surgery_formats.canonical.quantised_base import quantised_base_of
from surgery_formats.models.base_name import hub_name

__all__ = ["merge_card"]


def merge_card(binding: Binding, ledger: Ledger, *, residual: bool = False, relation: Relation = "merge") -> bytes:
    """README.md of a merged model.

    Args:
        binding: What was merged.
        ledger: What was measured.
        residual: Whether the weights are to be used with the LoRA beside them.
        relation: What it is of its base, unless its weights are codes.
    """
    base = binding.checkpoint
    names = ", ".join(name_of(adapter.path) for adapter, _ in binding.adapters)
    told = [adapter.base_name for adapter, _ in binding.adapters if quantised_base_of(adapter) is None]
    head = card_metadata(
        base.path,
        hub_name(base, told),
        relation="quantized" if residual else relation_of(ledger, relation),
        library="diffusers" if base.is_pipeline else "transformers",
        task=next((adapter.task for adapter, _ in binding.adapters if adapter.task), ""),
        tags=(relation,) if relation == "merge" else (),
    )
    beside = "The weights do not hold all of the update: attach the LoRA in `adapter/`, for instance with PEFT."
    return card(
        head,
        f"{model_name(base)} with {names} {'beside it' if residual else 'merged in'}",
        adapter_table(binding.adapters),
        measured_table((base_row(base), *code_rows(ledger), *measured_of(ledger))),
        notes=[beside] if residual else [],
        warnings=ledger.plan.warnings,
    )
