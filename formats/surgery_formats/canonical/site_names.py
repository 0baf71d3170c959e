# SPDX-License-Identifier: Apache-2.0
"""When two files name the same parameter: one may flatten its path, or call the denoiser otherwise."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.models.families.denoisers import COMPONENTS

__all__ = ["common_names", "flattened", "in_component_of", "same_denoiser"]


def same_denoiser(components: Iterable[str]) -> Mapping[str, str]:
    """One name for the network that removes noise, where adapters or files call it by several; nothing where they do not."""
    names = sorted(set(components) & set(COMPONENTS))
    return dict.fromkeys(names, names[0]) if len(names) > 1 else {}


def in_component_of(meant: Collection[Site], written: Adapter, *, named: bool) -> Adapter:
    """`written` with its sites in the component that those of `meant` have, where just one of both names any.

    A format without components leaves their names out. One that has to name some writes a network of none as the one that
    removes noise, which nobody but the base could contradict.

    Args:
        meant: What was to be written.
        written: What was read back.
        named: Whether a base tells the components apart: then a component that was written has to be the base's.
    """
    wanted, found = ({site.component for site in sites} for sites in (meant, written.updates))
    left_out = len(wanted) == 1 and found == {""}
    given = wanted == {""} and len(found) == 1 and found <= {*COMPONENTS} and not named
    if not (left_out or given):
        return written
    moved = {replace(site, component=min(wanted)): chain for site, chain in written.updates.items()}
    return replace(written, updates=moved)


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
