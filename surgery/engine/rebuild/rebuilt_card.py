# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint that was made of another one's files: other layers, a grown vocabulary, a merge taken back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from surgery.engine.card import adapter_table, card, measured_table
from surgery.engine.card_figures import base_row, measured_of
from surgery.engine.card_metadata import Relation, base_of_card, card_metadata
from surgery.engine.ledger import Ledger
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.models.base_name import hub_name
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["rebuilt_card"]


def rebuilt_card(
    source: Checkpoint,
    title: str,
    ledger: Ledger,
    measured: Iterable[tuple[str, str]] = (),
    *,
    adapters: Sequence[tuple[Adapter, float]] = (),
    relation: Relation = "",
    tags: Sequence[str] = (),
    gone: Collection[str] = (),
    name: str | None = None,
    warnings: Iterable[str] = (),
) -> bytes:
    """README.md of what was made of `source`.

    Args:
        source: The model; what its card says and still holds is kept.
        title: In Markdown.
        ledger: Every tensor.
        measured: Rows of the table of figures, before those of tensors.
        adapters: What it has more, or less.
        relation: What it is of its base.
        tags: For the hub.
        gone: Tags of `source` that are no longer true.
        name: Of its base on the hub; None for the source, or the base that the source's own card names.
        warnings: As the result says them.
    """
    told = [adapter.base_name for adapter, _ in adapters]
    folder = source.path.parent if source.is_graph else source.path
    base, behind = (hub_name(source, told), base_of_card(folder)) if name is None else (name, "")
    library = "diffusers" if source.is_pipeline else "transformers"
    head = card_metadata(folder, base, relation=relation, library=library, behind=behind, tags=tags, gone=gone)
    tables = [adapter_table(adapters)] if adapters else []
    rows = (base_row(source), *measured, *measured_of(ledger))
    return card(head, title, *tables, measured_table(rows), warnings=warnings)
