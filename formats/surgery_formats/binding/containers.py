# SPDX-License-Identifier: Apache-2.0
"""Leading containers are interchangeable: ``model.language_model.layers`` and ``language_model.model.layers`` may be one.

No family is asked. Names that the base lacks are read under other leading segments where all that share theirs then
name weights of fitting shapes, one to one, and only one such reading exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.names import Names, WeightSlice, extent
from surgery_formats.text import show
from surgery_formats.updates import Update, is_replacing, is_row_setting, is_unsized

__all__ = ["WRAPPERS", "fits", "housed", "unwrapped"]

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"})
"""Segments that wrappers of torch add to names: compilation, sharding, recomputation, data parallelism."""

_DEPTH = 3  # leading segments that are dropped or added at most


def unwrapped(path: str) -> str:
    """`path` without what wrappers added, and without PEFT's prefix where it was written twice."""
    kept = ".".join(segment for segment in path.split(".") if segment not in WRAPPERS)
    while kept.startswith("base_model.model."):
        kept = kept.removeprefix("base_model.model.")
    return kept


def housed(adapter: Adapter, checkpoint: Checkpoint) -> tuple[Adapter, tuple[str, ...]]:
    """`adapter` under the names that the base has, and what was read as what.

    Raises:
        FitError: there are two such readings.
    """
    owners = {site.component: checkpoint.names_of(site.component) for site in adapter.updates}
    names = {component: found for component, found in owners.items() if found is not None}
    missing: dict[Site, tuple[Update, ...]] = {}
    places: list[tuple[str, tuple[str, int]]] = []
    containers: set[tuple[str, str]] = set()
    for site, chain in adapter.updates.items():
        if site.component not in names:  # a network that the base lacks
            continue
        slices = names[site.component].resolve(site.path, flat=site.flat)
        if slices:
            places.append((site.component, _place(slices)))
            containers.add((site.component, _container(site.path)))
        elif not (site.flat or (is_replacing(chain[0]) and adapter.new_modules & set(site.path.split(".")))):
            missing[site] = chain
    if not missing:
        return adapter, ()
    found: dict[Site, Site] = {}
    notes: list[str] = []
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in missing:
        groups.setdefault((site.component, _container(unwrapped(site.path))), []).append(site)
    for (component, container), sites in groups.items():
        taken = frozenset(place for owner, place in places if owner == component)
        needed = [site for site in sites if site not in adapter.optional] or sites
        readings = list(_readings(container, needed, missing, names[component], taken))
        if (component, container) in containers:  # names that are there as they are: the others are not elsewhere
            readings = [home for home in readings if home == container]
        if len(readings) > 1:
            raise FitError(
                f"names in '{show(container)}' may be those in '{readings[0]}' or in '{readings[1]}' of the base",
                file=adapter.path,
                tensor=sites[0].path,
                hint="the base has several models in it",
            )
        for home in readings:
            found |= {site: replace(site, path=_moved(unwrapped(site.path), container, home)) for site in sites}
            places += [(component, _place(names[component].resolve_here(found[site].path))) for site in needed]
            notes += _notes(container, home, sites)
    updates = {found.get(site, site): chain for site, chain in adapter.updates.items()}
    if len(updates) < len(adapter.updates):
        return adapter, ()
    optional = frozenset(found.get(site, site) for site in adapter.optional)
    notes = [f"{adapter.path.name}: {note}" for note in dict.fromkeys(notes)]
    return replace(adapter, updates=updates, optional=optional), tuple(notes)


def _notes(container: str, home: str, sites: Sequence[Site]) -> Iterator[str]:
    if home != container:
        yield f"'{show(container)}' in its names is '{home}' in the base's"
    if any(unwrapped(site.path) != site.path for site in sites):
        yield "its names have segments that wrappers of torch or PEFT added; they were removed"


def _place(slices: Sequence[WeightSlice]) -> tuple[str, int]:
    """What tells the weight of one site from another's."""
    first = slices[0].parameter
    position = first.view.cols if first.view.transposed else first.view.rows
    return slices[0].alias or first.name, position[0] if len(position) else 0


def _container(path: str) -> str:
    """What stands before the list of layers, or before a module that is in no list, at most `_DEPTH` segments."""
    segments = path.split(".")
    numbered = next((at for at, segment in enumerate(segments) if segment.isdigit()), len(segments) - 1)
    return ".".join(segments[: max(0, min(numbered - 1, _DEPTH))])


def _readings(
    container: str,
    sites: Sequence[Site],
    missing: Mapping[Site, tuple[Update, ...]],
    names: Names,
    taken: frozenset[tuple[str, int]],
) -> Iterator[str]:
    """Containers of the base in which all the sites fit, one for each set of weights."""
    own = container.split(".") if container else []
    seen: set[tuple[tuple[str, int], ...]] = set()
    kept = [".".join(own[dropped:]) for dropped in range(len(own) + 1)]
    homes = (".".join(part for part in (home, rest) if part) for rest in kept for home in ("", *_homes(names)))
    for home in dict.fromkeys((container, *homes)):
        places = []
        for site in sites:
            slices = names.resolve_here(_moved(unwrapped(site.path), container, home))
            if not slices or not all(fits(update, slices) for update in missing[site]):
                break
            places.append(_place(slices))
        else:
            key = tuple(places)
            if len(set(places)) == len(places) and not taken & set(places) and key not in seen:
                seen.add(key)
                yield home


def _homes(names: Names) -> Iterator[str]:
    """Leading segments of the base's names, in the files and in the model's code."""
    homes: dict[str, None] = {}
    for name in (*names.parameters, *names.eras.parameters):
        segments = name.split(".")
        for depth in range(1, min(_DEPTH, len(segments) - 2) + 1):
            if any(segment.isdigit() for segment in segments[:depth]):
                break
            homes.setdefault(".".join(segments[:depth]))
    yield from sorted(homes)


def _moved(path: str, container: str, home: str) -> str:
    rest = path.removeprefix(f"{container}.") if container else path
    return f"{home}.{rest}" if home else rest


def fits(update: Update, slices: Sequence[WeightSlice]) -> bool:
    """Whether an update has the shape of a weight, either way round; one that its base has to size fits any."""
    if is_unsized(update):
        return True
    if is_replacing(update):
        return len(slices) == 1 and update.stored.shape == slices[0].parameter.sizes
    if is_row_setting(update):
        return update.shape[1] == extent(slices)[1]
    return update.shape in (extent(slices), extent(slices)[::-1])
