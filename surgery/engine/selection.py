# SPDX-License-Identifier: Apache-2.0
"""Parts of an adapter by the names of its modules: to split one into several, or to leave blocks out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from surgery_formats.canonical.adapter import Adapter, Site, WeightedAdapter
from surgery_formats.errors import FitError, NothingChangedError
from surgery_formats.text import closest, listing, show, summed_up

__all__ = ["Selection", "check_patterns", "left_out_warning"]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which modules to keep.

    Patterns are those of a shell (``*``, ``?``, ``[ab]``), and match from any dot on to the end.

    ``q_proj``, ``self_attn.*`` and ``layers.[01].*`` all match ``model.layers.0.self_attn.q_proj``.

    Attributes:
        only: A module must match one of these; empty keeps all.
        without: A module must match none of these.
    """

    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def keeps(self, site: Site) -> bool:
        """Whether the parameter `site` is kept."""
        chosen = not self.only or any(matches(pattern, site) for pattern in self.only)
        return chosen and not any(matches(pattern, site) for pattern in self.without)

    def of(self, adapter: Adapter) -> tuple[Adapter, tuple[Site, ...]]:
        """`adapter` with only the sites that are kept, and the sites that are not."""
        left = tuple(site for site in adapter.updates if not self.keeps(site))
        return (adapter.only(site for site in adapter.updates if self.keeps(site)) if left else adapter), left

    def chosen(self, terms: Sequence[WeightedAdapter]) -> tuple[list[WeightedAdapter], tuple[str, ...]]:
        """Every adapter reduced to the chosen modules, those with nothing left dropped, and the names of what went.

        Raises:
            FitError: a pattern matches no module.
            NothingChangedError: no module is left.
        """
        check_patterns(self, [term.adapter for term in terms])
        kept: list[WeightedAdapter] = []
        left: dict[str, None] = {}
        for term in terms:
            adapter, out = self.of(term.adapter)
            left |= dict.fromkeys(map(str, out))
            if adapter.updates or not out:
                kept.append(replace(term, adapter=adapter))
        if not kept:
            raise NothingChangedError(
                "no module is left", hint="widen `only=`" if self.only else "leave out less with `without=`"
            )
        return kept, tuple(left)


def left_out_warning(left: Sequence[str]) -> str:
    """What is said of the parameters that `without` left out."""
    return f"left out, as --without says: {len(left)} parameter{'s' if len(left) != 1 else ''}, {listing(summed_up(left), 6)}"


def matches(pattern: str, site: Site) -> bool:
    """Whether a pattern matches the path of the module or parameter, if need be with its component (``unet:*``)."""
    component, colon, pattern = pattern.rpartition(":")
    if colon and component != site.component:
        return False
    paths: tuple[str, ...] = (site.path.rpartition(".")[0], site.path)
    before = "."
    if site.flat:  # where a name begins is not known: at any underscore
        paths, before, pattern = tuple(p.replace(".", "_") for p in paths), "_", pattern.replace(".", "_")
    return any(fnmatchcase(path, pattern) or fnmatchcase(path, f"*{before}{pattern}") for path in paths)


def check_patterns(selection: Selection, adapters: Sequence[Adapter]) -> None:
    """Refuse patterns that match nothing: almost certainly a typo.

    Raises:
        FitError: a pattern matches no module.
    """
    sites = [site for adapter in adapters for site in adapter.updates]
    for pattern in (*selection.only, *selection.without):
        if not any(matches(pattern, site) for site in sites):
            names = sorted({segment for site in sites for segment in site.path.split(".") if not segment.isdigit()})
            raise FitError(
                f"no module matches '{show(pattern)}'",
                file=adapters[0].path,
                hint=closest(pattern, names) or "the modules are those that `inspect` lists",
            )
