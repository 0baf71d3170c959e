# SPDX-License-Identifier: Apache-2.0
"""When two files name the same parameter: one may flatten its path, or call the denoiser otherwise."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from surgery_formats.canonical.adapter import Site
from surgery_formats.models.families.denoisers import COMPONENTS

__all__ = ["common_names", "flattened", "same_denoiser"]


def same_denoiser(components: Iterable[str]) -> Mapping[str, str]:
    """One name for the network that removes noise, where adapters or files call it by several; nothing where they do not."""
    names = sorted(set(components) & set(COMPONENTS))
    return dict.fromkeys(names, names[0]) if len(names) > 1 else {}


def flattened(path: str) -> str:
    """The path of a parameter as kohya writes it: underscores for the dots of its module."""
    module, _, leaf = path.rpartition(".")
    return f"{module.replace('.', '_')}.{leaf}"


def common_names(sites: Collection[Site]) -> Callable[[Site], str]:
    """Names under which sites of several files are the same if their parameters are, as far as names tell."""
    called = same_denoiser(site.component for site in sites)
    flat = len({site.flat for site in sites}) > 1

    def name(site: Site) -> str:
        path = flattened(site.path) if flat else site.path
        return str(replace(site, component=called.get(site.component, site.component), path=path))

    return name
