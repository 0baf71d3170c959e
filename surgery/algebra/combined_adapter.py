# SPDX-License-Identifier: Apache-2.0
"""A combination as an `Adapter` for a format's writer.

It has the combined updates, and everything else of its sources' files that still holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery_formats.adapters.format import Format, Inheriting, Spelling
from surgery_formats.canonical.adapter import Adapter, Site, WeightedAdapter
from surgery_formats.tensors.tensor import origin
from surgery_formats.updates import Update, low_rank_part

__all__ = ["combined_adapter", "side_files"]


def combined_adapter(
    terms: Sequence[WeightedAdapter], updates: Mapping[Site, tuple[Update, ...]], target: Format
) -> Adapter:
    """An adapter that does `updates` and was made from `terms`, for the writer of the format `target`.

    Raises:
        FitError: no one configuration of the format describes such an adapter.
    """
    adapters = [term.adapter for term in terms]
    first = adapters[0]
    tensors = {origin(tensor): tensor for chain in updates.values() for update in chain for tensor in update.tensors}
    # A format's own writer keeps what its configuration said; it is only asked to where all sources are of it.
    same = all(adapter.format == target.name for adapter in adapters)
    config: Mapping[str, Any] = first.config if same else {}
    if same and isinstance(target, Inheriting) and not _is_of_another_kind(updates):
        config = target.inherited(adapters, updates)
    elif not _kinds_of([updates]) <= _kinds_of(adapter.updates for adapter in adapters):
        config = {}
    return Adapter(
        path=first.path,
        format=target.name if same and config else "combined",
        kind=first.kind,
        updates=updates,
        tensors=tuple(tensors.values()),
        new_modules=frozenset().union(*(adapter.new_modules for adapter in adapters)),
        copied_modules=frozenset().union(*(adapter.copied_modules for adapter in adapters)),
        base_name=next((adapter.base_name for adapter in adapters if adapter.base_name), ""),
        base_id=next((adapter.base_id for adapter in adapters if adapter.base_id), ""),
        config=config,
        metadata=_shared([adapter.metadata for adapter in adapters]),
        keeps_ties=first.keeps_ties,
        task=first.task if same else "",
        stored_transposed=same and first.stored_transposed,
        spelling={target.name: target.spelt_as(adapters)} if isinstance(target, Spelling) else {},
    )


def _kinds_of(changes: Iterable[Mapping[Site, tuple[Update, ...]]]) -> set[str]:
    return {update.kind for updates in changes for chain in updates.values() for update in chain}


def _is_of_another_kind(updates: Mapping[Site, tuple[Update, ...]]) -> bool:
    """Whether some updates have factors that are not low-rank, and none has low-rank ones.

    The configuration of such an adapter still holds after combining, if its updates are still of the kind they were.
    """
    parts = [part for chain in updates.values() for update in chain for _, part in update.parts()]
    low_rank = any(low_rank_part(part) for part in parts)
    return not low_rank and any(part.effect != "sets" and len(part.factors()) > 0 for part in parts)


def _shared(metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Strings on which all agree: what one training wrote is not true of two."""
    return {key: value for key, value in metadata[0].items() if all(other.get(key) == value for other in metadata)}


def side_files(terms: Sequence[WeightedAdapter]) -> dict[str, Path]:
    """Tokenizer files and the like, the first adapter's where several have one of a name."""
    return {name: path for term in reversed(terms) for name, path in term.adapter.files_beside.items()}
