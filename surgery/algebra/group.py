# SPDX-License-Identifier: Apache-2.0
"""Which updates of several adapters are of one weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.reports.targets import touched
from surgery_formats.adapters.writing import places_of, whole_place
from surgery_formats.canonical.adapter import Site, WeightedAdapter
from surgery_formats.errors import FitError
from surgery_formats.text import listing, show
from surgery_formats.updates import Replacement, Update

if TYPE_CHECKING:
    from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["Contribution", "group", "key_of"]


@dataclass(frozen=True, slots=True)
class Contribution:
    """One adapter's update of one weight.

    Attributes:
        owner: Number of the adapter.
        site: Where.
        update: What.
        weight: On it.
        carried: Whether it is no update at all, but the base's own value: PEFT stores a whole embedding beside its LoRA.
    """

    owner: int
    site: Site
    update: Update
    weight: float
    carried: bool = False


def key_of(site: Site, *, flat: bool) -> tuple[str, str]:
    """By what two adapters' names for one weight are recognised; underscores for dots where one of the adapters writes them so."""
    module, _, leaf = site.path.rpartition(".")
    return site.component, f"{module.replace('.', '_')}.{leaf}" if flat else site.path


def group(given: Sequence[WeightedAdapter], base: Checkpoint | None) -> dict[tuple[str, str], list[Contribution]]:
    """Every update of every adapter, those of one weight together, in the order of the adapters.

    Raises:
        FitError: the adapters name the same weights differently, and only a base can tell.
    """
    flat = any(site.flat for one in given for site in one.adapter.updates)
    parts = {site.component for one in given for site in one.adapter.updates} - {""}
    found: dict[tuple[str, str], list[Contribution]] = {}
    seen: list[set[tuple[str, str]]] = []
    for owner, one in enumerate(given):
        mine: set[tuple[str, str]] = set()
        carried = {entry.name for entry in touched(one.adapter) if entry.held == "carried"}
        for site, chain in one.adapter.updates.items():
            if not site.component and len(parts) > 1:
                raise FitError(f"which of {listing(sorted(parts))} it belongs to is not known", file=one.adapter.path)
            named = replace(site, component=site.component or next(iter(parts), ""))
            key = key_of(named, flat=flat)
            if base is not None and (whole := whole_place(places_of(named, base, chain[0].tensors))):
                key = named.component, whole[0]
            shares = found.setdefault(key, [])
            where = shares[0].site if shares else named
            for update in chain:
                own = isinstance(update, Replacement) and str(site) in carried
                shares.append(Contribution(owner, where, update, one.weight, own))
            mine.add(key)
        seen.append(mine)
    if base is None:
        _check_spellings(given, seen)
    return found


def _check_spellings(given: Sequence[WeightedAdapter], seen: Sequence[set[tuple[str, str]]]) -> None:
    """``layers.0.x`` beside ``model.layers.0.x``: the same weight, or not; no adapter's file can tell."""
    for owner, mine in enumerate(seen):
        for component, path in mine:
            rest = path
            while "." in (rest := rest.partition(".")[2]):
                other = next((i for i, keys in enumerate(seen) if i != owner and (component, rest) in keys), None)
                if other is not None and (component, path) not in seen[other]:
                    raise FitError(
                        f"'{show(path)}' of {show(given[owner].name)} may be '{show(rest)}' of {show(given[other].name)}",
                        hint="give the model with --base, which knows its weights",
                    )
