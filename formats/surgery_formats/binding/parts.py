# SPDX-License-Identifier: Apache-2.0
"""The part of a pipeline that an adapter belongs to, where its own names do not tell it.

PEFT's folders hold one network's names alone, and ComfyUI calls a text encoder the same whatever number a pipeline has it under.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace

from surgery_formats.binding.containers import fits
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.layouts.parts import encoder_name
from surgery_formats.models.names import WeightSlice
from surgery_formats.text import listing

__all__ = ["in_component", "in_its_encoder", "in_its_part"]

_FIRST, _SECOND, _THIRD = "text_encoder", "text_encoder_2", "text_encoder_3"
_HINT = "convert it for one of them first, which is named with `component=`"


def in_component(adapter: Adapter, component: str) -> Adapter:
    """`adapter`, all of which changes one network, as one that names it."""
    updates = {replace(site, component=component): chain for site, chain in adapter.updates.items()}
    optional = frozenset(replace(site, component=component) for site in adapter.optional)
    return replace(adapter, updates=updates, optional=optional)


def in_its_encoder(adapter: Adapter, base: Checkpoint) -> Adapter:
    """`adapter` with its text encoders under the numbers that the base has them.

    ComfyUI's ``clip_l`` is the second of HunyuanVideo's, behind a Llama; sd-scripts' and ComfyUI's T5, their third, is Flux's second.
    """
    return _with_clip_second(_with_t5_in_place(adapter, base), base)


def _with_clip_second(adapter: Adapter, base: Checkpoint) -> Adapter:
    moved = {
        site: replace(site, component=_SECOND)
        for site, chain in adapter.updates.items()
        if site.component == _FIRST and all(encoder_name(t.name) == "clip_l" for one in chain for t in one.tensors)
    }
    first, second = base.names_of(_FIRST), base.names_of(_SECOND)
    if not moved or first is None or second is None:
        return adapter
    if any(first.resolve(site.path) for site in moved) or not all(second.resolve(site.path) for site in moved):
        return adapter
    return _moved(adapter, moved)


def _with_t5_in_place(adapter: Adapter, base: Checkpoint) -> Adapter:
    """A part that is no text encoder's, such as a file of T5 alone, has no number."""
    home = base.name_of(_THIRD)
    if home == _THIRD or not home.startswith(_FIRST) or any(site.component == home for site in adapter.updates):
        return adapter
    return _moved(
        adapter, {site: replace(site, component=home) for site in adapter.updates if site.component == _THIRD}
    )


def _moved(adapter: Adapter, moved: Mapping[Site, Site]) -> Adapter:
    """`adapter` with sites of one component under another, and with the spellings of their modules."""
    updates = {moved.get(site, site): chain for site, chain in adapter.updates.items()}
    if not moved or len(updates) < len(adapter.updates):
        return adapter
    old, new = next((before.component, after.component) for before, after in moved.items())
    modules = {f":{site.path.rpartition('.')[0]}" for site in moved}
    spelling = {
        name: {**spelt, **{f"{new}{one}": spelt[f"{old}{one}"] for one in sorted(modules) if f"{old}{one}" in spelt}}
        for name, spelt in adapter.spelling.items()
    }
    optional = frozenset(moved.get(site, site) for site in adapter.optional)
    return replace(adapter, updates=updates, optional=optional, spelling=spelling)


def in_its_part(adapter: Adapter, base: Checkpoint, hint: str = _HINT) -> Adapter:
    """`adapter` as one that names the only network of `base` which has its parameters; as it is if it names some itself.

    Raises:
        FitError: the base is a pipeline, and several of its networks have them, or none has.
    """
    if not adapter.updates or any(site.component for site in adapter.updates):
        return in_its_encoder(adapter, base)
    if base.component("") is not None:
        return adapter
    found = {name: _found(adapter, component) for name, component in base.components.items()}
    some = [name for name, (held, _) in found.items() if held]
    whole = [name for name in some if found[name][1]]
    if len(chosen := some if len(some) == 1 else whole) == 1:
        return in_component(adapter, chosen[0])
    raise FitError(
        f"which part of the pipeline it belongs to is not known (it fits {listing(whole) or 'none'}; "
        f"there are {listing(sorted(found))})",
        file=adapter.path,
        hint=hint if whole else "is this the base it was trained on?",
    )


def _found(adapter: Adapter, component: Component) -> tuple[int, bool]:
    """How many parameters the network has by their names, and whether it has all in the right shapes."""
    held, fitting = 0, True
    for site, chain in adapter.updates.items():
        slices: tuple[WeightSlice, ...] = ()
        with contextlib.suppress(FitError):  # a name of several weights here says nothing of the other networks
            slices = component.names.resolve(site.path, flat=site.flat)
        held += bool(slices)
        if site not in adapter.optional:
            fitting = fitting and bool(slices) and all(fits(update, slices) for update in chain)
    return held, fitting
