# SPDX-License-Identifier: Apache-2.0
"""The parts of an adapter that change weights: what each of its updates is, for programs that load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from surgery.consumers.part import AdapterPart
from surgery.consumers.traits import Trait
from surgery_formats.adapters.contents import contents_of
from surgery_formats.adapters.embeddings import EMBEDDINGS
from surgery_formats.adapters.writing import places_of, whole_place
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.eras import taken_for_experts
from surgery_formats.models.families.family import role_of
from surgery_formats.updates import Update, is_refusing

__all__ = ["parts_of_updates", "vocabulary_rows"]

_HEADS = frozenset(["lm_head", "embed_out", "output_projection"])
_CLASSIFIERS = frozenset(["score", "classifier", "qa_outputs"])


def parts_of_updates(
    adapter: Adapter, base: Checkpoint, updates: Mapping[Site, tuple[Update, ...]]
) -> tuple[AdapterPart, ...]:
    """One part for each update.

    Args:
        adapter: The adapter.
        base: The model it belongs to.
        updates: Its updates with the sizes that the base tells.
    """
    parts = (replace(_part(site, update, base), update=update) for site, chain in updates.items() for update in chain)
    if adapter.format != "peft":
        return tuple(parts)
    return tuple(_as_taken(part, adapter, base) for part in parts)


def _part(site: Site, update: Update, base: Checkpoint) -> AdapterPart:
    held, name = contents_of(update), str(site)
    if is_refusing(update):
        return AdapterPart(name, "other kind", update.kind)
    if held.whole is not None and held.whole.held == "carried" and ".base_layer." in held.whole.stored.name:
        return AdapterPart(name, "carried weight", update.kind)
    if held.whole is not None:
        return AdapterPart(name, _saved(site, held.whole.stored.shape, base), update.kind)
    if held.rows is not None:
        return AdapterPart(name, "token rows", update.kind)
    if held.dora is not None:
        return AdapterPart(name, "DoRA", update.kind, held.dora.direction.rank, held.dora.direction.scale)
    if held.stack is not None:
        return AdapterPart(name, "LoRA of stacked experts", update.kind, held.stack.rank, held.stack.scale)
    if held.offset is not None:
        return AdapterPart(name, "bias of a LoRA" if site.path.endswith(".bias") else "other kind", update.kind)
    if held.lora is update:
        return AdapterPart(name, _lora(site, update, base), update.kind, update.rank, update.scale)
    if update.kind.startswith("LoRA"):
        return AdapterPart(name, "LoRA on a changed base", update.kind, update.rank, update.scale)
    return AdapterPart(name, "other kind", update.kind)


def _lora(site: Site, update: Update, base: Checkpoint) -> Trait:
    """What a LoRA is of."""
    path = site.path.removesuffix(".weight")
    leaf = path.rpartition(".")[2]
    main = None if base.is_pipeline else base.main
    if site.module_kind == "experts" and not site.path.endswith(".weight"):
        return "LoRA of stacked experts"
    if site.module_kind == "convolution" or any(site.kernel):
        return "LoRA of a convolution"
    if site.module_kind == "embedding" or leaf in EMBEDDINGS:
        return "LoRA of an embedding"
    if leaf in _HEADS or (main is not None and main.head == f"{path}.weight"):
        return "LoRA of the head"
    if ".experts." in f".{path}." and any(segment.isdecimal() for segment in path.partition("experts.")[2].split(".")):
        return "LoRA of one expert"
    if main is not None and main.family.stores_transposed(f"{path}.weight"):
        return "LoRA of a turned weight"
    place = whole_place(places_of(site, base, update.tensors))
    if place is not None and len(place[1]) > 2:
        return "LoRA of a convolution"
    return "LoRA"


def _as_taken(part: AdapterPart, adapter: Adapter, base: Checkpoint) -> AdapterPart:
    """The part, where PEFT takes its module for experts of an older release unless it is a parameter's LoRA."""
    if part.trait != "LoRA" or base.is_pipeline or part.leaf not in taken_for_experts(base.main.config):
        return part
    own = adapter.config.get("target_parameters") or ()
    is_parameter = any(f".{part.module}.weight".endswith(f".{name}") for name in own)
    return part if is_parameter else replace(part, trait="LoRA taken for experts")


def _saved(site: Site, shape: tuple[int, ...], base: Checkpoint) -> Trait:
    """What a parameter is that is stored in full."""
    module, _, leaf = site.path.rpartition(".")
    if leaf == "bias":
        return "trained bias" if role_of(site.path) not in ("norm", "head") else _of_role(role_of(site.path))
    last = module.rpartition(".")[2]
    if last in _HEADS or last in EMBEDDINGS:
        rows = vocabulary_rows(base)
        return "added rows" if rows is not None and shape[0] > rows else "saved vocabulary"
    if last in _CLASSIFIERS:
        return "saved head"
    return _of_role(role_of(site.path))


def _of_role(role: str) -> Trait:
    return "saved norm" if role == "norm" else "saved head" if role == "head" else "saved module"


def vocabulary_rows(base: Checkpoint) -> int | None:
    """Rows of the base's embedding; None where it has none."""
    if base.is_pipeline or not base.main.embedding:
        return None
    return base.main.parameters[base.main.embedding].shape[0]
