# SPDX-License-Identifier: Apache-2.0
"""Put an adapter's experts into a folder in a dialect, and tell what is left for the folder's other modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from surgery_formats.adapters.contents import contents_of
from surgery_formats.adapters.expert_layers import ExpertLayer, expert_layers, has_gate
from surgery_formats.adapters.experts import SWITCH
from surgery_formats.adapters.peft.dialects.dialect import ExpertDialect
from surgery_formats.adapters.peft.dialects.stacks import PEFT_STACKS
from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.writing import commonest
from surgery_formats.binding.sizes import component_of
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.eras import is_known, taken_for_experts
from surgery_formats.models.expert_stacks import parse_expert_path
from surgery_formats.updates import LoRA, Update

__all__ = ["needed_dialect", "put_experts"]


def put_experts(
    file: PeftFile, dialect: ExpertDialect, updates: Sequence[tuple[Site, Update]]
) -> list[tuple[Site, Update]]:
    """Write the experts of an adapter as `dialect` holds them, and return the other updates.

    PEFT's own stacks of experts without a gate are among the others: PEFT has them as the model's class does.

    Raises:
        FitError: there are experts, and no base is given, or the dialect cannot hold them.
    """
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
            if site not in left:
                continue
            if dialect is PEFT_STACKS and _is_without_gate(site, file.base):
                others.append((site, update))
            else:
                file.drop(site, update, left[site])
    if dialect.uniform:
        file.even = _even(layers, others)
    for layer in layers:
        said = dialect.put(file, layer)
        for site, update in layer.updates:
            file.ledger.keep(site, update, "folded" if said else "exact", said or f"{dialect.name}: {layer.module}")
    return others


def needed_dialect(adapter: Adapter, base: Checkpoint, *, made_anew: bool) -> ExpertDialect | None:
    """PEFT's own dialect where it attaches nothing to the experts one by one; None where they stay as they are.

    So it is where the model's class has stacks and PEFT makes none of single experts, and where no record takes the
    stacks of another program apart.

    Args:
        adapter: With the names that are written.
        base: The model.
        made_anew: Whether the folder is no PEFT folder's copy, whose experts then are as they were.
    """
    for site, chain in adapter.updates.items():
        component, named = component_of(site, base), parse_expert_path(site.path)
        known = is_known(component.config) and not taken_for_experts(component.config)
        if made_anew and SWITCH in site.path and known:
            return PEFT_STACKS
        if named is None or site.path == named.stack or all(contents_of(update).stack is None for update in chain):
            continue
        if has_gate(named, component) and not component.family.fused:
            return PEFT_STACKS
    return None


def _is_without_gate(site: Site, base: Checkpoint) -> bool:
    named = parse_expert_path(site.path)
    return named is not None and not has_gate(named, component_of(site, base))


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
