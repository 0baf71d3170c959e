# SPDX-License-Identifier: Apache-2.0
"""The model card of the LoRA that a merge with a residual writes beside a quantised model."""

from __future__ import annotations

from surgery.engine.card import adapter_table, card, measured_table, model_name, name_of
from surgery.engine.card_metadata import card_metadata
from surgery_formats.binding.bind import Binding
from surgery_formats.canonical.quantised_base import quantised_base_of
from surgery_formats.models.base_name import hub_name

__all__ = ["residual_card"]


def residual_card(binding: Binding, error: float, rank: int) -> bytes:
    """README.md of the LoRA beside a model that was merged with a residual: it is for that model, and no adapter of the base.

    Args:
        binding: What was merged.
        error: Of model and LoRA together, relative to the updates.
        rank: The greatest of a weight.
    """
    base, names = binding.checkpoint, ", ".join(name_of(adapter.path) for adapter, _ in binding.adapters)
    told = [adapter.base_name for adapter, _ in binding.adapters if quantised_base_of(adapter) is None]
    head = card_metadata(
        base.path,
        "",
        relation="",
        library="peft",
        behind=hub_name(base, told),
        task=next((adapter.task for adapter, _ in binding.adapters if adapter.task), ""),
        tags=("lora",),
    )
    rows = [("greatest rank", f"{rank}"), ("error of model and LoRA together, of the update", f"{error:.2%}")]
    beside = "It belongs to the model in the folder above, whose codes hold the rest: it is no adapter of the base."
    return card(
        head,
        f"What the codes of {model_name(base)} do not hold of {names}",
        adapter_table(binding.adapters),
        measured_table(rows),
        notes=[beside],
        manifest="../surgery_manifest.json",
    )
