# SPDX-License-Identifier: Apache-2.0
"""Which updates of several adapters are of one weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

from surgery_formats.adapters.contents import contents_of
from surgery_formats.adapters.rows import widened
from surgery_formats.adapters.writing import places_of, whole_place
from surgery_formats.binding.sizes import sized, slices_of
from surgery_formats.canonical.adapter import Adapter, Site, WeightedAdapter
from surgery_formats.canonical.site_names import flattened, same_denoiser
from surgery_formats.errors import FitError
from surgery_formats.models.families.denoisers import COMPONENTS, of_two_layouts
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
    placed: list[_OnBase] = []
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
            contributions = groups.setdefault(key, [])
            if contributions:
                named = replace(named, path=contributions[0].site.path, component=contributions[0].site.component)
            new = tuple(Contribution(owner, named, plain_form(update), term.weight) for update in chain)
            contributions += new
            if base is not None:
                placed.append(_OnBase(key, places, new, term.adapter))
            mine.add(key)
        seen.append(mine)
    if base is None:
        _check_spellings(terms, seen)
    else:
        _on_stored(groups, placed, base)
    return groups


@dataclass(frozen=True, slots=True)
class _OnBase:
    """The updates of a site, and where the base holds its weight."""

    key: tuple[str, str]
    places: tuple[WeightSlice, ...]
    contributions: tuple[Contribution, ...]
    adapter: Adapter


def _on_stored(groups: dict[tuple[str, str], list[Contribution]], placed: Sequence[_OnBase], base: Checkpoint) -> None:
    """Put what changes a weight whole in one adapter and in parts in another onto the weights that the base stores.

    Raises:
        FitError: an update that is no LoRA, or that is of something else than rows.
    """
    held: dict[tuple[str, str], list[tuple[_OnBase, View]]] = {}
    clashing: dict[tuple[str, str], Site] = {}
    for one in placed:
        for parameter in (place.parameter for place in one.places):
            others = held.setdefault((parameter.component, parameter.name), [])
            for other, view in others:
                if other.key != one.key and intersect(view, parameter.view):
                    clashing |= {each.key: each.contributions[0].site for each in (other, one)}
            others.append((one, parameter.view))
    sites = {
        place.parameter.name: one.contributions[0].site
        for one in placed
        for place in one.places
        if whole_place(one.places) is not None
    }
    for key in clashing:
        groups.pop(key, None)
    for one in placed:
        for place in one.places if one.key in clashing else ():
            name = place.parameter.name
            if name not in sites:
                part, inside = base.components[place.parameter.component].within(name)
                sites[name] = replace(one.contributions[0].site, path=inside, component=part, flat=False)
            for each in one.contributions:
                update = _of_place(each, place, [*clashing.values()], one.adapter)
                moved = replace(each, site=sites[name], update=update)
                groups.setdefault((sites[name].component, name), []).append(moved)


def _of_place(contribution: Contribution, place: WeightSlice, clashing: Sequence[Site], adapter: Adapter) -> Update:
    """What an update does to one weight that the base stores."""
    held, parameter = contents_of(contribution.update), place.parameter
    view, sizes = parameter.view, parameter.sizes
    lora = None if held.dora else held.lora
    if lora is None or view.transposed or len(sizes) != 2 or view.shape[1] != sizes[1]:
        first, second, *_ = clashing
        raise FitError(
            f"'{first}' and '{second}' are one weight of the base in two layouts, whole in one and in parts in the other",
            file=adapter.path,
            hint="`surgery merge` takes them together, into the base",
        )
    return widened(lora, view, parameter.storage.shape)


def applicable_updates(adapter: Adapter, base: Checkpoint) -> Mapping[Site, tuple[Update, ...]]:
    """The updates with the sizes that only a base tells, without the optional ones that it lacks."""

    def lacks(site: Site) -> bool:
        return site in adapter.optional and not slices_of(site, base)

    return {site: chain for site, chain in sized(adapter, base).updates.items() if not lacks(site)}


def _check_spellings(terms: Sequence[WeightedAdapter], seen: Sequence[set[tuple[str, str]]]) -> None:
    """``layers.0.x`` beside ``model.layers.0.x``: the same weight, or not; no adapter's file can tell.

    Nor whether ``double_blocks.0.img_attn.qkv`` and ``transformer_blocks.0.attn.to_q`` meet: programs that load a file of
    both take one of them.
    """
    inside = [[path for component, path in mine if component in ("", *COMPONENTS)] for mine in seen]
    for first, second in combinations(range(len(seen)), 2):
        if of_two_layouts(inside[first], inside[second]):
            raise FitError(
                f"{show(terms[first].name)} and {show(terms[second].name)} name one network's modules in two ways, its "
                "release's and diffusers'",
                hint="give the model with `base=`, which knows its weights",
            )
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
