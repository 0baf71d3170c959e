# SPDX-License-Identifier: Apache-2.0
"""An adapter held against a base by names and shapes, for reports: no values are read and little is refused.

What a merge would do is decided by `surgery_formats.binding.bind`; this only tells roles and sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.reports.targets import site_roles
from surgery_formats.binding.bind import other_base
from surgery_formats.binding.containers import housed
from surgery_formats.binding.parts import in_its_part
from surgery_formats.binding.sizes import fit_of, slices_of
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.names import WeightSlice, extent
from surgery_formats.text import closest, listing, show
from surgery_formats.updates import Update, experts_of, is_replacing, is_row_setting, is_unsized

__all__ = ["FitReport", "fit_report"]


@dataclass(frozen=True, slots=True)
class FitReport:
    """How an adapter fits a base.

    Attributes:
        roles: Role of each parameter by the base's own name for it, or by the adapter's where the base has no such parameter.
        grown: Numbers by which the base itself grows while the adapter is attached: rows of a resized vocabulary, and
            the originals of heads that it lacks (PEFT keeps the original of every module it trains in full).
        warnings: What does not fit.
    """

    roles: Mapping[Site, str]
    grown: int
    warnings: tuple[str, ...]


def fit_report(adapter: Adapter, base: Checkpoint) -> FitReport:
    """Resolve every parameter of `adapter` in `base`.

    Raises:
        FitError: none of them is there in the right shape.
    """
    given = adapter
    adapter, notes = housed(in_its_part(given, base), base)
    roles: dict[Site, str] = {}
    sizes: dict[tuple[str, str], int] = {}
    odd: list[Site] = []
    heads = 0
    for site, chain in adapter.updates.items():
        component = base.component(site.component)
        places = slices_of(site, base)
        if not places and is_replacing(chain[0]) and adapter.new_modules & set(site.path.split(".")):
            heads += chain[0].stored.numel
            continue
        if component is None or not places or not _fits(chain, places, component.config):
            odd += [] if site in adapter.optional else [site]
            continue
        roles[site] = component.role(places[0].parameter.name)
        for update in chain:
            if is_replacing(update):
                old = places[0].parameter
                sizes[component.name, old.name] = update.stored.numel - old.numel
    if odd and not roles:
        (base.component(odd[0].component) or next(iter(base.components.values()))).check_read()
        raise FitError(
            f"the base has none of its {len(odd)} parameters in the right shape, such as '{show(odd[0])}'",
            file=adapter.path,
            hint=_hint(odd[0], base),
        )
    elsewhere = other_base(given, base)
    warnings = (*_prompt(adapter, base), *notes, *([elsewhere] if elsewhere else []))
    if odd:
        count = f"{len(odd)} of {len(adapter.updates)} parameters"
        warnings = (f"{count} do not fit the base: {listing(map(str, odd))}", *warnings)
    return FitReport(
        site_roles(given) | _under_given_names(given, adapter, roles),
        heads + sum(sizes.values()),
        warnings,
    )


def _under_given_names(given: Adapter, housed_adapter: Adapter, roles: Mapping[Site, str]) -> dict[Site, str]:
    """Roles by the sites of an adapter as it was given: those under the base's names are as many, in the same order."""
    both = zip(given.updates, housed_adapter.updates, strict=True)
    return {site: roles[moved] for site, moved in both if moved in roles}


def _fits(chain: tuple[Update, ...], places: tuple[WeightSlice, ...], config: Mapping[str, Any]) -> bool:
    """Whether a chain fits by shape.

    A replacement may have more rows (a larger vocabulary); updates after it then have as many.
    """
    height, width = extent(places)
    for member in chain:
        update = member
        if is_unsized(member):
            try:
                update = member.fitted(fit_of(places, (height, width), config=config))
            except FitError:
                return False
        rows, cols = update.shape
        if is_replacing(update):
            old = places[0].parameter.sizes
            if update.stored.shape[1:] != old[1:] or len(places) > 1:
                return False
            height = rows if update.stored.shape != old else height
        elif experts_of(update):  # experts may be held either way round
            if rows * cols != height * width:
                return False
        elif cols != width or (rows > height if is_row_setting(update) else rows != height):
            return False
    return True


def _hint(site: Site, base: Checkpoint) -> str:
    component = base.component(site.component) or next(iter(base.components.values()))
    near = None if site.path in component.parameters else closest(site.path, component.parameters)
    return near or "is this the base it was trained on?"


def _prompt(adapter: Adapter, base: Checkpoint) -> tuple[str, ...]:
    """Virtual tokens must be as long as the base's embeddings; prefixes (keys and values) are of another length."""
    component = base.components.get("")
    if adapter.prompt is None or adapter.prompt.prefix or not component or not component.embedding:
        return ()
    problems = []
    width, dim = component.parameters[component.embedding].sizes[-1], adapter.prompt.dim
    if dim != width:
        problems.append(f"its virtual tokens have {dim} numbers, the base's embeddings {width}")
    if adapter.kind == "P_TUNING":
        problems.append("the encoder that made its virtual tokens is not in the file, so it is not counted as trained")
    return tuple(problems)
