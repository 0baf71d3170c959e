# SPDX-License-Identifier: Apache-2.0
"""What is converted of an adapter: a part of it, without what is left out, under names that its base has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from surgery.engine.inputs import as_list
from surgery.engine.selection import Selection
from surgery_formats.adapters.format import Entry
from surgery_formats.binding.containers import housed
from surgery_formats.binding.parts import in_component, in_its_encoder, in_its_part
from surgery_formats.canonical.adapter import Adapter, WeightedAdapter
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing

__all__ = ["ChosenPart", "chosen_part", "left_out", "placed"]


def placed(adapter: Adapter, base: Checkpoint | None, component: str | None) -> tuple[Adapter, tuple[Entry, ...]]:
    """The adapter with the component of every site known, or cut to the one chosen, and what that leaves out.

    Raises:
        FitError: the component is not in the adapter or the base, or cannot be told.
    """
    adapter = adapter if base is None else in_its_encoder(adapter, base)
    named = {site.component for site in adapter.updates} - {""}
    if component is not None and named:
        if component not in named:
            raise FitError(
                f"the adapter has no part '{component}'", file=adapter.path, hint=f"it has {listing(sorted(named))}"
            )
        kept = [site for site in adapter.updates if site.component == component]
        left = sorted(str(site) for site in adapter.updates.keys() - set(kept))
        return adapter.only(kept), tuple(Entry(name, "dropped", "not of the chosen part") for name in left)
    if base is None or not base.is_pipeline or named:
        return adapter, ()
    if component is None:
        return in_its_part(adapter, base, "name it with `component=`"), ()
    if component not in base.components:
        has = listing(sorted(base.components))
        raise FitError(f"the base has no part '{component}'", file=base.path, hint=f"it has {has}")
    return in_component(adapter, component), ()


class ChosenPart(NamedTuple):
    """What is converted of an adapter.

    Attributes:
        adapter: It, with names that its base has.
        left: What is left out by choice.
    """

    adapter: Adapter
    left: tuple[Entry, ...]


def chosen_part(
    adapter: Adapter, base: Checkpoint | None, component: str | None, without: str | Sequence[str]
) -> ChosenPart:
    """The part of an adapter that was chosen, without the modules of the patterns `without`.

    Raises:
        FitError: a part or a module that is not there.
    """
    adapter, out = left_out(adapter, without)
    adapter, left = placed(adapter, base, component)
    if base is not None and not base.is_pipeline:
        adapter, _ = housed(adapter, base)  # writers ask the base by these names
    return ChosenPart(adapter, (*out, *left))


def left_out(adapter: Adapter, without: str | Sequence[str]) -> tuple[Adapter, tuple[Entry, ...]]:
    """`adapter` without the modules that are to be left out, and what became of those."""
    if not without:
        return adapter, ()
    (kept,), names = Selection(without=tuple(as_list(without))).chosen([WeightedAdapter(adapter, 1.0)])
    return kept.adapter, tuple(Entry(name, "dropped", "left out by choice") for name in names)
