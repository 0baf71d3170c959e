# SPDX-License-Identifier: Apache-2.0
"""Adapters without some of their updates: those that are asked to go, and those that change nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from surgery_formats.adapters.contents import contents_of
from surgery_formats.adapters.format import Entry, Rendering
from surgery_formats.adapters.writing import whole_place
from surgery_formats.binding.sizes import slices_of
from surgery_formats.binding.tied_edits import same_values
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.storage.plain import Plain
from surgery_formats.updates import Update

__all__ = ["without", "without_base_values"]


def without(adapter: Adapter, gone: Iterable[Update], files: Iterable[str]) -> Adapter:
    """Leave out updates, with the tensors that no other uses, and side files.

    Raises:
        FitError: nothing would be left.
    """
    out = {id(update) for update in gone}
    if not out:
        kept = dict(adapter.updates)
    else:
        chains = {site: tuple(one for one in chain if id(one) not in out) for site, chain in adapter.updates.items()}
        kept = {site: chain for site, chain in chains.items() if chain}
    if not kept:
        raise FitError("nothing of it would be left", file=adapter.path, hint="merge it into the base")
    used = {tensor.name for chain in kept.values() for update in chain for tensor in update.tensors}
    names = set(files)
    return replace(
        adapter,
        updates=kept,
        tensors=tuple(tensor for tensor in adapter.tensors if tensor.name in used) if out else adapter.tensors,
        ignored=() if out else adapter.ignored,
        side_files=tuple(file for file in adapter.side_files if file.name not in names),
    )


def without_base_values(adapter: Adapter, rendering: Rendering, base: Checkpoint) -> tuple[Adapter, tuple[Entry, ...]]:
    """The adapter without what a format had no place for and the base has already, and what that leaves out.

    PEFT saves the vocabulary whole beside a LoRA of it, or because it is listed, whether it was trained or not.
    """
    kept = {id(update) for chain in rendering.held.values() for update in chain}
    lost = [(site, one) for site, chain in adapter.updates.items() for one in chain if id(one) not in kept]
    gone = {id(one): (site, one) for site, one in lost if _is_of_base(site, one, base)}
    if not gone or len(gone) == sum(map(len, adapter.updates.values())):
        return adapter, ()
    stay = {site for site, chain in adapter.updates.items() for one in chain if id(one) not in gone}
    for number, (site, _) in list(gone.items()):
        names = _stored(site, base)
        if any(_stored(other, base) & names for other in stay if other != site):
            del gone[number]  # it keeps a tied weight apart from what changes the other
    entries = tuple(Entry(str(site), "dropped", "the base's own values") for site, _ in gone.values())
    return (without(adapter, (update for _, update in gone.values()), ()) if gone else adapter), entries


def _is_of_base(site: Site, update: Update, base: Checkpoint) -> bool:
    """Whether an update puts the values in a weight's place that it has."""
    whole = contents_of(update).whole
    places = slices_of(site, base) if whole is not None else ()
    if whole is None or not places or whole_place(places) is None:
        return False
    return same_values(Plain.of(whole.stored), places[0].parameter.storage)


def _stored(site: Site, base: Checkpoint) -> set[str]:
    return {place.parameter.name for place in slices_of(site, base)}
