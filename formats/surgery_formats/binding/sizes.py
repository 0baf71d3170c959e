# SPDX-License-Identifier: Apache-2.0
"""Sizes that an adapter's files lack and its base has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.names import WeightSlice, extent
from surgery_formats.storage.parameter import Parameter
from surgery_formats.text import listing
from surgery_formats.updates import Fit, Update, is_unsized, is_waiting

__all__ = ["check_complete", "component_of", "fit_of", "sized", "slices_of", "widest_of"]


def component_of(site: Site, base: Checkpoint) -> Component:
    """The component of a base that a site refers to.

    Raises:
        FitError: the base has no such component.
    """
    if (component := base.component(site.component)) is None:
        changed, has = site.component or "one model", listing(sorted(base.components))
        raise FitError(f"the adapter changes '{changed}', the base has {has}", file=base.path)
    return component


def slices_of(site: Site, base: Checkpoint) -> tuple[WeightSlice, ...]:
    """Every piece of the weight that `site` names; empty if the base has no such weight, or no such network.

    Raises:
        FitError: the name fits several weights.
    """
    names = base.names_of(site.component)
    return names.resolve(site.path, flat=site.flat) if names else ()


def fit_of(
    places: tuple[WeightSlice, ...],
    widest: tuple[int, int],
    beside: Parameter | None = None,
    config: Mapping[str, Any] | None = None,
) -> Fit:
    """Facts about the weight at `places` that an update may need; see `Fit`."""
    storage = places[0].parameter.storage
    sizes = storage.sizes
    kernel = math.prod(sizes[2:]) if storage.shape[0] == sizes[0] else 1  # else a stack of experts
    convolution = len(sizes) > 2 and storage.shape[0] == sizes[0]
    return Fit(extent(places), kernel, widest, beside, config or {}, convolution)


def widest_of(kind: str, adapter: Adapter, checkpoint: Checkpoint) -> tuple[int, int]:
    """``(out, in)``, each the greatest of all weights for which `adapter` has updates of `kind`."""
    shapes = [(0, 0)]
    for site, chain in adapter.updates.items():
        if any(update.kind == kind for update in chain):
            shapes += [extent(slices)] if (slices := slices_of(site, checkpoint)) else []
    return max(rows for rows, _ in shapes), max(cols for _, cols in shapes)


def _beside(site: Site, base: Checkpoint) -> Parameter | None:
    """The weight of the layer whose bias `site` is."""
    module, _, leaf = site.path.rpartition(".")
    weights = slices_of(replace(site, path=f"{module}.weight"), base) if leaf == "bias" else ()
    return weights[0].parameter if len(weights) == 1 else None


def sized(adapter: Adapter, base: Checkpoint) -> Adapter:
    """`adapter` with every update fitted to its weight; an update without a weight in the base is unchanged.

    Raises:
        FitError: an update cannot act on such a weight.
    """
    widest: dict[str, tuple[int, int]] = {}

    def fitted(site: Site, update: Update) -> Update:
        if not is_unsized(update):
            return update
        places = slices_of(site, base)
        if not places:
            return update
        if update.kind not in widest:
            widest[update.kind] = widest_of(update.kind, adapter, base)
        component = base.component(site.component)
        return update.fitted(
            fit_of(places, widest[update.kind], _beside(site, base), component.config if component else {})
        )

    return replace(
        adapter,
        updates={site: tuple(fitted(site, update) for update in chain) for site, chain in adapter.updates.items()},
    )


def check_complete(source: Adapter) -> None:
    """Refuse updates that mean nothing before a base is known.

    Raises:
        FitError: there are some.
    """
    for site, chain in source.updates.items():
        if why := next((update.waits for update in chain if is_waiting(update)), ""):
            raise FitError(why, file=source.path, tensor=str(site), hint="give it with `base=`")
