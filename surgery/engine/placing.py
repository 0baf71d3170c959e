# SPDX-License-Identifier: Apache-2.0
"""Which part of a pipeline an adapter belongs to: told by its names, by the user, or by the one part that it fits."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from surgery_formats.adapters.format import Entry
from surgery_formats.binding.bind import Binding, bind
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing

__all__ = ["placed", "placed_where_it_fits"]


def placed(
    adapter: Adapter, base: Checkpoint | None, component: str | None
) -> tuple[Adapter, tuple[Entry, ...], Binding | None]:
    """The adapter with the component of every site known, or cut to the one chosen, and what that leaves out.

    The third is its binding to the base, where the component was found by binding it.

    Raises:
        FitError: the component is not in the adapter or the base, or cannot be told.
    """
    named = {site.component for site in adapter.updates} - {""}
    if component is not None and named:
        if component not in named:
            raise FitError(
                f"the adapter has no part '{component}'", file=adapter.path, hint=f"it has {listing(sorted(named))}"
            )
        kept = [site for site in adapter.updates if site.component == component]
        left = sorted(str(site) for site in adapter.updates.keys() - set(kept))
        return adapter.only(kept), tuple(Entry(name, "dropped", "not of the chosen part") for name in left), None
    if base is None or not base.is_pipeline or named:
        return adapter, (), None
    fitting = {component: None} if component is not None else _fitting(adapter, base)
    if len(fitting) != 1 or not fitting.keys() <= base.components.keys():
        raise FitError(
            f"which part of the pipeline it belongs to is not known (it fits {listing(fitting) or 'none'})",
            file=adapter.path,
            hint=f"name it with `component=`; the base has {listing(sorted(base.components))}",
        )
    ((name, binding),) = fitting.items()
    return (_moved(adapter, name) if binding is None else binding.adapters[0][0]), (), binding


def _fitting(adapter: Adapter, base: Checkpoint) -> dict[str, Binding | None]:
    """Parts of a pipeline that every update of the adapter fits, by names and shapes, and its binding to each."""
    fitting: dict[str, Binding | None] = {}
    for name in sorted(base.components):
        with contextlib.suppress(FitError):
            fitting[name] = bind([(_moved(adapter, name), 1.0)], base)
    return fitting


def _moved(adapter: Adapter, component: str) -> Adapter:
    updates = {replace(site, component=component): chain for site, chain in adapter.updates.items()}
    return replace(adapter, updates=updates)


def placed_where_it_fits(adapter: Adapter, base: Checkpoint) -> Adapter:
    """An adapter that names no part of a pipeline, for the one part that it fits; itself where there is none such."""
    if not base.is_pipeline or not adapter.updates or any(site.component for site in adapter.updates):
        return adapter
    fitting = list(_fitting(adapter, base))
    return _moved(adapter, fitting[0]) if len(fitting) == 1 else adapter
