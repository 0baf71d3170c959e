# SPDX-License-Identifier: Apache-2.0
"""Rewritings of an adapter, each a pure function; what each leaves to the writer of a format is not done here.

All of them keep what the adapter does to every weight, except for what is left out, or approximated by a LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from surgery_formats.adapters.contents import contents_of
from surgery_formats.adapters.writing import places_of, zero_padded
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.tensors.computed import zeros
from surgery_formats.updates import Factor, LoRA, Stacked, Update

__all__ = ["padded", "scaled_inside", "with_partners"]


def scaled_inside(adapter: Adapter, factors: Mapping[str, float]) -> Adapter:
    """The same changes with scales that are `factors` times as large, by site, and B as much smaller."""
    updates = {
        site: tuple(_inside(update, factors[str(site)]) for update in chain) if str(site) in factors else chain
        for site, chain in adapter.updates.items()
    }
    return replace(adapter, updates=updates)


def _inside(update: Update, factor: float) -> Update:
    held = contents_of(update)
    if held.stack is not None:
        turned = tuple(_scaled(expert, factor) for expert in held.stack.if_transposed)
        return Stacked(tuple(_scaled(expert, factor) for expert in held.stack.experts), turned)
    return _scaled(held.lora, factor) if held.lora is not None else update


def _scaled(lora: LoRA, factor: float) -> LoRA:
    def smaller(values: Array) -> Array:
        return values / factor

    B = Factor.computed([lora.B], lora.B.shape, smaller)
    return replace(lora, B=B, scale=lora.scale * factor, alpha=None)


def padded(adapter: Adapter) -> Adapter:
    """One rank for all LoRAs: directions of zeros behind the others. The scales stay."""
    held = {site: [contents_of(update) for update in chain] for site, chain in adapter.updates.items()}
    rank = max((one.lora.rank for chain in held.values() for one in chain if one.lora is not None), default=0)
    updates = {
        site: tuple(_padded(one.lora, rank) if one.lora is not None else one.update for one in chain)
        for site, chain in held.items()
    }
    return replace(adapter, updates=updates)


def _padded(lora: LoRA, rank: int) -> LoRA:
    if lora.rank == rank:
        return lora

    def rows(values: Array) -> Array:
        return zero_padded(values, 0, rank)

    def columns(values: Array) -> Array:
        return zero_padded(values, 1, rank)

    out, inputs = lora.shape
    A, B = Factor.computed([lora.A], (rank, inputs), rows), Factor.computed([lora.B], (out, rank), columns)
    return replace(lora, A=A, B=B, alpha=None)


def with_partners(adapter: Adapter, base: Checkpoint, partners: Mapping[str, str]) -> Adapter:
    """LoRAs of zeros for modules that a program expects beside others.

    Args:
        adapter: The adapter.
        base: The model, for the modules' sizes.
        partners: From the path of each such module to that of the one beside it, which has a LoRA.

    Raises:
        FitError: the base has no such module.
    """
    by_module = {site.path.removesuffix(".weight"): site for site in adapter.updates}
    added: dict[Site, tuple[Update, ...]] = {}
    for path, beside in partners.items():
        site = replace(by_module[beside], path=f"{path}.weight")
        model = next(lora for update in adapter.updates[by_module[beside]] if (lora := contents_of(update).lora))
        places = places_of(site, base, model.tensors)
        out, inputs = sum(place.parameter.shape[0] for place in places), places[0].parameter.shape[1]
        dtype = model.B.tensors[0].dtype if model.B.tensors else DType.F32
        A = Factor.of(zeros(f"{path}.A", dtype, (model.rank, inputs)))
        B = Factor.of(zeros(f"{path}.B", dtype, (out, model.rank)))
        added[site] = (LoRA(A, B, model.scale),)
    return replace(adapter, updates=dict(sorted({**adapter.updates, **added}.items())))
