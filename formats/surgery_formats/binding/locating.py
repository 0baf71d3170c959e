# SPDX-License-Identifier: Apache-2.0
"""Where the base holds what an adapter changes; a head for a new task, and a bias of a graph, it need not hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

from surgery_formats.binding.sizes import slices_of
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.names import WeightSlice
from surgery_formats.storage.parameter import Parameter
from surgery_formats.tensors.computed import zeros
from surgery_formats.updates import Update, is_replacing

__all__ = ["LocatedChain", "located"]


@dataclass(frozen=True, slots=True)
class LocatedChain:
    """The updates of one site, and where the base holds its weight."""

    site: Site
    updates: tuple[Update, ...]
    component: Component
    slices: tuple[WeightSlice, ...]


def located(
    adapter: Adapter, checkpoint: Checkpoint, *, new_biases: bool
) -> tuple[tuple[LocatedChain, ...], tuple[Site, ...]]:
    """Every chain of an adapter with its weight in the base, and the sites that have none and need one.

    Args:
        adapter: With the sizes that the base tells.
        checkpoint: The base.
        new_biases: See `bind`.

    Raises:
        FitError: a weight is of a format of codes that no storage reads, or a name means several weights.
    """
    chains: list[LocatedChain] = []
    missing: list[Site] = []
    for site, updates in adapter.updates.items():
        component = checkpoint.component(site.component)
        if component is None:
            missing.append(site)
            continue
        slices = slices_of(site, checkpoint) or _new_head(site, updates, adapter, component)
        if not slices and new_biases and site not in adapter.optional:
            slices = _new_bias(site, updates, component)
        if slices:
            _check_read(slices, component)
            chains.append(LocatedChain(site, updates, component, slices))
        elif site not in adapter.optional:
            missing.append(site)
    return tuple(chains), tuple(missing)


def _check_read(slices: tuple[WeightSlice, ...], component: Component) -> None:
    """Refuse a weight that is a part of one in an unread format, by what is known of that."""
    for place in slices:
        storage = place.parameter.storage
        if not storage.is_float and component.unread is not None and storage.name in component.unread.tensors:
            raise component.unread.error()


def _new_head(site: Site, chain: tuple[Update, ...], adapter: Adapter, component: Component) -> tuple[WeightSlice, ...]:
    """A new weight for a head that was added for a task and that the base lacks."""
    module = site.path.rpartition(".")[0]
    if not (is_replacing(chain[0]) and len(chain) == 1 and adapter.new_modules & set(module.split("."))):
        return ()
    if any(segment.isdigit() for segment in module.split(".")):  # a layer the base lacks is no new head
        return ()
    return (WeightSlice(replace(Parameter.of(chain[0].stored, component.name), name=site.path)),)


def _new_bias(site: Site, chain: tuple[Update, ...], component: Component) -> tuple[WeightSlice, ...]:
    """A bias of zeros for a layer that has none; the base must hold its weight whole and apart."""
    module, _, leaf = site.path.rpartition(".")
    if leaf != "bias" or not all(update.effect == "adds" for update in chain):
        return ()
    weights = component.names.resolve(f"{module}.weight", flat=site.flat)
    if len(weights) != 1 or not (name := weights[0].parameter.name).endswith(".weight"):
        return ()
    parameter = weights[0].parameter
    if not parameter.is_whole:
        return ()
    bias = zeros(name.removesuffix("weight") + "bias", DType.F32, parameter.shape[:1])
    return (WeightSlice(Parameter.of(bias, component.name)),)
