# SPDX-License-Identifier: Apache-2.0
"""Put an adapter's experts into a folder in a dialect, and tell what is left for the folder's other modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from surgery_formats.adapters.contents import contents_of
from surgery_formats.adapters.expert_layers import ExpertLayer, expert_layers
from surgery_formats.adapters.peft.dialects.stacks import PEFT_STACKS
from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.writing import commonest
from surgery_formats.binding.sizes import component_of
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import FitError
from surgery_formats.models.expert_stacks import parse_expert_path
from surgery_formats.updates import LoRA, Update

if TYPE_CHECKING:
    from surgery_formats.adapters.peft.dialects.dialect import ExpertDialect

__all__ = ["needed_dialect", "put_experts"]


def put_experts(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> list[tuple[Site, Update]]:
    """Write the experts of an adapter as `file.dialect` holds them, and return the other updates.

    Raises:
        FitError: there are experts, and no base is given, or the dialect cannot hold them.
    """
    dialect = file.dialect
    assert dialect is not None
    experts = [(site, update) for site, update in updates if parse_expert_path(site.path)]
    others = [(site, update) for site, update in updates if not parse_expert_path(site.path)]
    layers: tuple[ExpertLayer, ...] = ()
    if experts:
        if file.base is None:
            raise FitError(
                "only the base tells how its experts are held", file=file.adapter.path, hint="give it with `base=`"
            )
        layers, left = expert_layers(file.adapter, file.base)
        for site, update in experts:
            if site in left:
                file.drop(site, update, left[site])
    if dialect.uniform:
        file.even = _even(layers, others)
    for layer in layers:
        said = dialect.put(file, layer)
        for site, update in layer.updates:
            file.ledger.keep(site, update, "folded" if said else "exact", said or f"{dialect.name}: {layer.module}")
    return others


def needed_dialect(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> ExpertDialect | None:
    """PEFT's own dialect where stacks of other programs meet a base that no record takes apart; None elsewhere."""
    for site, update in updates:
        named = parse_expert_path(site.path)
        if file.base is None or named is None or site.path == named.stack or contents_of(update).stack is None:
            continue
        component = component_of(site, file.base)
        own = site.path in component.names.eras.parameters  # experts without a gate, as Nemotron H's
        if not own and not component.family.fused:
            return PEFT_STACKS
    return None


def _even(layers: Sequence[ExpertLayer], others: Sequence[tuple[Site, Update]]) -> tuple[int, float] | None:
    """The greatest rank and the commonest scale."""
    loras = list(_loras(layers, others))
    scale = commonest(lora.scale for lora in loras if lora.scale)
    return None if scale is None else (max(lora.rank for lora in loras), scale)


def _loras(layers: Sequence[ExpertLayer], others: Sequence[tuple[Site, Update]]) -> Iterator[LoRA]:
    for layer in layers:
        for stack in layer.stacks.values():
            yield from stack.loras.values()
    for _, update in others:
        if (lora := contents_of(update).lora) is not None:
            yield lora
