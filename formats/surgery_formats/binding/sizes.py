# SPDX-License-Identifier: Apache-2.0
"""Gives updates the sizes that their files do not tell and a base does."""

from __future__ import annotations

from dataclasses import replace

from surgery_formats.binding.bind import component_of, fit_of, widest_of
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.updates import Unsized, Update

__all__ = ["sized"]


def sized(adapter: Adapter, base: Checkpoint) -> Adapter:
    """`adapter` with every update fitted to the weight it meets; what meets none in `base` stays as it is.

    Raises:
        FitError: an update cannot act on such a weight.
    """
    widest: dict[str, tuple[int, int]] = {}

    def fitted(site: Site, update: Update) -> Update:
        if not isinstance(update, Unsized):
            return update
        places = component_of(site, adapter, base).names.resolve(site.path, flat=site.flat)
        if not places:
            return update
        if update.kind not in widest:
            widest[update.kind] = widest_of(update.kind, adapter, base)
        return update.fitted(fit_of(places, widest[update.kind]))

    return replace(
        adapter,
        updates={site: tuple(fitted(site, update) for update in chain) for site, chain in adapter.updates.items()},
    )
