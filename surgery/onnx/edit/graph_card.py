# SPDX-License-Identifier: Apache-2.0
"""The model card of a graph that was changed: merged into, given slots or modules, folded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from surgery.engine.card import CARD, adapter_table, card, measured_table, name_of
from surgery.engine.card_metadata import Relation, base_of_card, card_metadata, relation_of_card
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.files.remote.hub_cache import cached_repository
from surgery_formats.models.base_name import hub_name, is_hub_name
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["edited_card", "folded_relation"]


def edited_card(
    graph: Path,
    title: str,
    measured: Iterable[tuple[str, str]],
    *,
    base: Checkpoint | None = None,
    adapters: Sequence[tuple[Adapter, float]] = (),
    relation: Relation = "",
    warnings: Iterable[str] = (),
) -> bytes:
    """README.md of a changed graph.

    Args:
        graph: The file it was made of. What the card beside it says and still holds is kept, and else what the base's says.
        title: Behind the name of the graph's file, in Markdown: where it lay is not told.
        measured: Rows of the table of figures.
        base: The checkpoint that the graph was made of, if it was given.
        adapters: What was put in.
        relation: What the result is of its base.
        warnings: As the result says them.
    """
    folder = graph.parent
    own = (folder / CARD).is_file() or base is None
    of_graph = base_of_card(folder) or _repository(folder)
    head = card_metadata(
        folder if own else base.path if base is not None else None,
        of_graph if base is None else hub_name(base, [adapter.base_name for adapter, _ in adapters]),
        relation=relation,
        library="onnx",
        behind=of_graph,
        tags=("onnx", *((relation,) if relation == "merge" else ())),
    )
    tables = [adapter_table(adapters)] if adapters else []
    return card(head, f"{name_of(graph)} {title}", *tables, measured_table(measured), warnings=warnings)


def folded_relation(graph: Path, *, added: bool) -> Relation:
    """What a graph with folded branches is of the base that its card will name: no more than is known without that base.

    The card beside a graph may name a base behind the one that it was made of, and does not say so.

    Args:
        graph: The file.
        added: Whether adapters were given that it did not have.
    """
    if base_of_card(graph.parent):
        told = relation_of_card(graph.parent)
        return told if told in ("merge", "quantized") or not added else ""
    return "merge" if added else ""  # of the graph itself, under its repository's name


def _repository(folder: Path) -> str:
    """That of the graph on the hub."""
    cached = cached_repository(folder)
    return cached[0] if cached is not None and is_hub_name(cached[0]) else ""
