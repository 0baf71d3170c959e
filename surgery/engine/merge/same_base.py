# SPDX-License-Identifier: Apache-2.0
"""An adapter on top of a merge into the base that it was trained on."""

from __future__ import annotations

from dataclasses import replace

from surgery.engine.card_metadata import base_of_card, relation_of_card
from surgery_formats.binding.bind import Binding, other_base
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.models.base_name import base_name
from surgery_formats.updates import is_linear

__all__ = ["with_known_bases"]


def with_known_bases(binding: Binding) -> tuple[Binding, tuple[str, ...]]:
    """The binding, and notes in the place of its warnings of another base, where that is a merge into the recorded one.

    The card of a merge names the base. What only adds numbers adds the same to the merge. What acts on the weights, such
    as a DoRA, does something else to others, and stays a warning that says so.
    """
    base, notes, warnings = binding.checkpoint, list[str](), list(binding.warnings)
    made_of = base_of_card(base.path) if relation_of_card(base.path) == "merge" else ""
    for adapter, _ in binding.adapters:
        told = other_base(adapter, base)
        if told is None or not made_of or adapter.base_name != made_of:
            continue
        warnings.remove(f"{adapter.path.name}: {told}")
        said = (
            f"{adapter.path.name}: was trained on '{made_of}', and '{base_name(base)}' is a merge into it by its card"
        )
        if _only_adds(adapter):
            notes.append(f"{said}: the sum is that of one merge of all of them, in this order")
        else:
            cure = f"one merge of all of them into '{made_of}' gives it the weights that it was trained on"
            warnings.append(f"{said}: its change depends on the weights, and {cure}")
    return replace(binding, warnings=tuple(warnings)), tuple(notes)


def _only_adds(adapter: Adapter) -> bool:
    return all(is_linear(update) for chain in adapter.updates.values() for update in chain)
