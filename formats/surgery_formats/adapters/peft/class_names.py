# SPDX-License-Identifier: Apache-2.0
"""The names that PEFT looks for: those of the modules of the model's class, which are not always those on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from surgery_formats.adapters.format import Rendering
from surgery_formats.binding.sizes import component_of
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.eras import is_known

__all__ = ["called_back", "class_names", "renamed"]


def class_names(adapter: Adapter, base: Checkpoint) -> Mapping[Site, Site]:
    """``{site under the class's name: site}``, where the two differ; none if two sites would then be one."""
    found: dict[Site, Site] = {}
    for site in adapter.updates:
        component = component_of(site, base)
        if site.flat or not is_known(component.config):
            continue
        eras = component.names.eras
        path = eras.renamed(site.path)
        if path != site.path and path in eras.renamings and eras.converted(path) is None:
            found[replace(site, path=path)] = site
    return {} if found.keys() & adapter.updates.keys() else found


def renamed(adapter: Adapter, names: Mapping[Site, Site]) -> Adapter:
    """`adapter` under the names of `class_names`."""
    new = {site: called for called, site in names.items()}
    return replace(adapter, updates={new.get(site, site): chain for site, chain in adapter.updates.items()})


def called_back(rendering: Rendering, names: Mapping[Site, Site]) -> Rendering:
    """`rendering` with its sites as the adapter called them."""
    back = {str(called): str(site) for called, site in names.items()}
    entries = tuple(replace(entry, site=back.get(entry.site, entry.site)) for entry in rendering.entries)
    held = {names.get(site, site): chain for site, chain in rendering.held.items()}
    return replace(rendering, entries=entries, held=held)
