# SPDX-License-Identifier: Apache-2.0
"""Which updates of several adapters are of one weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery_formats.adapters.writing import places_of, whole_place
from surgery_formats.binding.sizes import sized, slices_of
from surgery_formats.canonical.adapter import Adapter, Site, WeightedAdapter
from surgery_formats.canonical.site_names import flattened, same_denoiser
from surgery_formats.errors import FitError
from surgery_formats.tensors.views import intersect
from surgery_formats.text import listing, show
from surgery_formats.updates import Stacked, Update, is_replacing, plain_form, stack_of_loras

if TYPE_CHECKING:
    from surgery_formats.models.checkpoint import Checkpoint
    from surgery_formats.models.names import WeightSlice
    from surgery_formats.tensors.views import View

__all__ = ["Contribution", "applicable_updates", "group", "key_of"]


@dataclass(frozen=True, slots=True)
class Contribution:
    """One adapter's update of one weight.

    Attributes:
        owner: Number of the adapter.
        site: Where, spelled as the first adapter spells it.
        update: As a LoRA, a stack of LoRAs or an offset, if it has such a form.
        weight: On it.
    """

    owner: int
    site: Site
    update: Update
    weight: float

    @property
    def carried(self) -> bool:
        """Whether it is no update at all, but the base's own value: PEFT stores a whole embedding beside its LoRA."""
        return is_replacing(self.update) and self.update.held == "carried"

    @property
    def stack(self) -> Stacked | None:
        """The update as a stack of LoRAs, if it has that form."""
        return stack_of_loras(self.update)


def key_of(site: Site, *, flat: bool) -> tuple[str, str]:
    """The key under which two adapters' names for one weight are recognised as the same.

    Dots become underscores where one of the adapters writes them so.
    """
    return site.component, flattened(site.path) if flat else site.path


def group(terms: Sequence[WeightedAdapter], base: Checkpoint | None) -> dict[tuple[str, str], list[Contribution]]:
    """Every update of every adapter, those of one weight together, in the order of the adapters.

    With a base, updates get the sizes that only a base tells, and optional ones that it lacks are left out.

    Raises:
        FitError: the adapters name the same weights differently, and only a base can tell.
    """
    flat = any(site.flat for term in terms for site in term.adapter.updates)
    components = {site.component for term in terms for site in term.adapter.updates} - {""}
    called = same_denoiser(components)
    groups: dict[tuple[str, str], list[Contribution]] = {}
    seen: list[set[tuple[str, str]]] = []
    held: dict[tuple[str, str], list[tuple[tuple[str, str], Site, View]]] = {}
    for owner, term in enumerate(terms):
        mine: set[tuple[str, str]] = set()
        updates = term.adapter.updates if base is None else applicable_updates(term.adapter, base)
        for site, chain in updates.items():
            if not site.component and len(components) > 1:
                raise FitError(
                    f"which of {listing(sorted(components))} it belongs to is not known", file=term.adapter.path
                )
            named = replace(site, component=site.component or next(iter(components), ""))
            key = key_of(replace(named, component=called.get(named.component, named.component)), flat=flat)
            if base is not None:
                places = places_of(named, base, chain[0].tensors)
                if whole := whole_place(places):
                    key = key[0], whole[0]
                _check_parts(key, named, places, held, term.adapter)
            contributions = groups.setdefault(key, [])
            if contributions:
                named = replace(named, path=contributions[0].site.path, component=contributions[0].site.component)
            contributions += [Contribution(owner, named, plain_form(update), term.weight) for update in chain]
            mine.add(key)
        seen.append(mine)
    if base is None:
        _check_spellings(terms, seen)
    return groups


def _check_parts(
    key: tuple[str, str],
    site: Site,
    places: tuple[WeightSlice, ...],
    held: dict[tuple[str, str], list[tuple[tuple[str, str], Site, View]]],
    adapter: Adapter,
) -> None:
    """Refuse what changes a part of a weight that another update changes whole: no file can hold both.

    Args:
        key: Of the weight that `site` names.
        site: Where an update is.
        places: Where the base holds its weight.
        held: By stored weight: key, site and view of every update before; this one is added.
        adapter: Its adapter.
    """
    for place in places:
        parameter = place.parameter
        others = held.setdefault((parameter.component, parameter.name), [])
        for other, known, view in others:
            if other != key and intersect(view, parameter.view):
                raise FitError(
                    f"'{known}' and '{site}' are one weight of the base in two layouts, whole in one and in parts in the other",
                    file=adapter.path,
                    hint="merge them into the base together",
                )
        if all(entry[0] != key or entry[2] != parameter.view for entry in others):
            others.append((key, site, parameter.view))


def applicable_updates(adapter: Adapter, base: Checkpoint) -> Mapping[Site, tuple[Update, ...]]:
    """The updates with the sizes that only a base tells, without the optional ones that it lacks."""

    def lacks(site: Site) -> bool:
        return site in adapter.optional and not slices_of(site, base)

    return {site: chain for site, chain in sized(adapter, base).updates.items() if not lacks(site)}


def _check_spellings(terms: Sequence[WeightedAdapter], seen: Sequence[set[tuple[str, str]]]) -> None:
    """``layers.0.x`` beside ``model.layers.0.x``: the same weight, or not; no adapter's file can tell."""
    for owner, mine in enumerate(seen):
        for component, path in mine:
            rest = path
            while "." in (rest := rest.partition(".")[2]):
                other = next((i for i, keys in enumerate(seen) if i != owner and (component, rest) in keys), None)
                if other is not None and (component, path) not in seen[other]:
                    raise FitError(
                        f"'{show(path)}' of {show(terms[owner].name)} may be '{show(rest)}' of "
                        f"{show(terms[other].name)}",
                        hint="give the model with `base=`, which knows its weights",
                    )
