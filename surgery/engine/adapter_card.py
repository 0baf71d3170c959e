# SPDX-License-Identifier: Apache-2.0
"""The model card of an adapter that was made of others: converted, combined, resized; and of a soft prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from surgery.engine.card import CARD, adapter_table, card, measured_table, name_of
from surgery.engine.card_metadata import card_metadata
from surgery_formats.adapters.format import Format, Rendering
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.models.base_name import hub_name, is_hub_name
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["LIBRARIES", "with_card"]

LIBRARIES: Mapping[str, str] = {
    "peft": "peft",
    "adapterhub": "adapter-transformers",
    "mlx": "mlx",
    "compact": "model-surgery",
}
"""What loads an adapter, as the hub calls it, by the formats whose folders are put there."""


def with_card(
    rendering: Rendering,
    target: Format,
    sources: Sequence[tuple[Adapter, float]],
    base: Checkpoint | None,
    what: str,
    measured: Sequence[tuple[str, str]],
    *,
    moved: bool = False,
) -> Rendering:
    """`rendering` with a README.md, where `target` is a format whose folders have one on the hub.

    Args:
        rendering: Of what was made.
        target: Its format.
        sources: What it was made of.
        base: What it is for, if it was given.
        what: What was done: ``combined``.
        measured: Rows of the table of figures.
        moved: Whether `sources` are for another base.
    """
    if target.name not in LIBRARIES:
        return rendering
    adapters = [adapter for adapter, _ in sources]
    alone = adapters[0].path if len(adapters) == 1 and (adapters[0].path / CARD).is_file() else None
    told = [] if moved else [adapter.base_name for adapter in adapters]
    named = "" if base is None else hub_name(base, told)
    common = set(told).pop() if len(set(told)) == 1 else ""
    head = card_metadata(
        alone or (None if base is None else base.path),
        named or (common if base is None and is_hub_name(common) else ""),
        relation="adapter",
        library=LIBRARIES[target.name],
        task=adapters[0].task,
        tags=tuple(dict.fromkeys(adapter.kind_name.lower() for adapter in adapters)),
    )
    title = f"{', '.join(name_of(adapter.path) for adapter in adapters)}, {what}"
    text = card(head, title, adapter_table(sources), measured_table(measured))
    return replace(rendering, small_files={**rendering.small_files, CARD: text})
